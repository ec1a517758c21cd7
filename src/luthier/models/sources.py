"""Where a model is: a shipped name, run:<id>, a directory, or a hub id."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from luthier.core.errors import ModelError, RunError
from luthier.core.run import find_run

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
KNOCK_SECONDS = 10
# Where a run keeps its model.
MODEL = Path("artefacts") / "model"


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    assets = Path(str(files("luthier"))) / "assets"
    return sorted(path.parent.name for path in assets.glob("*/config.json"))


def resolve_source(source: str) -> Path | str:
    """The directory of a shipped model, a run's model or a local model; a hub id comes back as it is.

    Raises ModelError when a run holds no model, a path is not there, or the text is neither a path nor a hub id.
    """
    if source.startswith("run:"):
        try:
            run = find_run(source, _holds_model)
        except RunError as err:
            raise ModelError(str(err)) from None
        path = run / MODEL
        if not path.is_dir():
            raise ModelError(f"{source}: the run holds no model ({path} is missing); only a finished `tune` leaves one")
        return path
    if source in shipped_models():
        return Path(str(files("luthier"))) / "assets" / source
    # Unlike those of Path, these say no to what can be no path: a name that is too long, nobody's home.
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise ModelError(f"{source}: this is a file; a model is the directory that holds config.json and the weights")
    if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        raise _nowhere(source)
    return source


def _holds_model(run: Path) -> bool:
    return (run / MODEL).is_dir()


def settle(source: str) -> str:
    """run:last as the run that it is now, by its own name; anything else as it is. Raises ModelError where none holds a model."""
    if source != "run:last":
        return source
    path = resolve_source(source)
    assert isinstance(path, Path)
    return f"run:{path.parents[1].name}"


def lasting_name(source: str) -> str:
    """`source` in a form that still holds elsewhere: a local directory becomes absolute."""
    if source.startswith("run:") or source in shipped_models():
        return source
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


def knock(source: str) -> dict[str, Any]:
    """Keyword arguments for loading the hub id `source`, after one quick try to reach the hub.

    The hub's own client retries for half a minute before it gives up, for each file. When the hub does not answer,
    a model that is in the local cache is used from there; otherwise raises ModelError. So does an id that the hub
    does not know, does not show to this user, or takes for no name.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    # Its door is lazy, and does not say what it exports.
    from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(source)
    except HFValidationError:
        raise _nowhere(source) from None
    cached = isinstance(try_to_load_from_cache(source, "config.json"), str) or isinstance(
        try_to_load_from_cache(source, "adapter_config.json"), str
    )
    exits = f"check the name, load it once while the network is there, give a directory, or use {_shipped()}"
    if constants.is_offline_mode():
        if cached:
            return {"local_files_only": True}
        raise ModelError(f"{source}: not in the local cache, and HF_HUB_OFFLINE forbids asking the hub; {exits}")
    endpoint = constants.ENDPOINT
    try:
        answer = get_session().head(
            f"{endpoint}/{source}/resolve/main/config.json", headers=build_hf_headers(), timeout=KNOCK_SECONDS
        )
        trouble = f"status {answer.status_code}" if answer.status_code >= 500 else None
    except Exception as err:  # the client's exception classes changed between its versions
        trouble = type(err).__name__
    if trouble and cached:
        return {"local_files_only": True}
    if trouble:
        raise ModelError(
            f"{source}: no such directory, and the hub at {endpoint} cannot be reached ({trouble}); "
            f"{exits} (HF_ENDPOINT names a mirror)"
        )
    if answer.status_code in (401, 403):
        raise ModelError(
            f"{source}: the hub at {endpoint} does not show this model: it does not exist, or it is gated; "
            "check the name, accept its licence on its page, and set HF_TOKEN"
        )
    # A hub that has the model but not this file says so with the code EntryNotFound.
    if answer.status_code == 404 and answer.headers.get("x-error-code") != "EntryNotFound":
        raise ModelError(f"{source}: the hub at {endpoint} has no model of this name; {exits}")
    return {}


def cached_snapshot(source: str) -> Path | None:
    """The folder in the local cache that holds the newest known state of a hub id; None where there is none, as for what is no
    hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def current_snapshot(source: str) -> Path | None:
    """`cached_snapshot`, where the hub has nothing newer or cannot be asked. Raises ModelError as `knock` does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    place = cached_snapshot(source)
    if place is None or knock(source).get("local_files_only"):
        return place
    try:
        newest = get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=KNOCK_SECONDS).commit_hash
    except Exception:  # as many classes as the hub's client has versions; loading will say what is wrong
        return None
    return place if newest == place.name else None


def _nowhere(source: str) -> ModelError:
    return ModelError(
        f"{source}: no such directory; give a directory, run:<id>, a hub id (owner/name), or {_shipped()}"
    )


def _shipped() -> str:
    names = shipped_models()
    return f"a shipped model ({', '.join(names)})" if names else "a model on this machine"
