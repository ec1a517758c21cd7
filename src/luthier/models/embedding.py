"""How a model makes one vector of a text, by what its own files say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from luthier.core.errors import ModelError
from luthier.core.events import Events
from luthier.models.sources import resolve_source
from luthier.models.spec import LoadedModel, Pooling

# What sentence-transformers calls the ways of pooling that are done here: a switch for each, or later one word.
WAYS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "cls": "first",
    "lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class Manner:
    """Pooling over the last hidden states, and whether the vector is scaled to length 1."""

    pooling: Pooling
    normalised: bool


def made_for_vectors(model: LoadedModel) -> bool:
    """Whether a model's own files say how it makes vectors (modules.json)."""
    return read_part(model.spec.source, "modules.json") is not None


def manner_of(model: LoadedModel, events: Events | None = None) -> Manner:
    """As the files of sentence-transformers say where they are, read once: modules.json, and the pooling that it names, or that
    of 1_Pooling where there is no modules.json. Else a tuned head's pooling, the mean of an encoder, the last token of a decoder.
    Raises ModelError for files that ask for more than that, or cannot be read."""
    if model.manner is None:
        model.manner = _read_manner(model, events)
    return model.manner


def _read_manner(model: LoadedModel, events: Events | None) -> Manner:
    spec = model.spec
    modules = read_part(spec.source, "modules.json", events)
    path, normalised = "1_Pooling", False
    if modules is not None:
        listed = [one for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []
        kinds = [str(one.get("type", "")).rsplit(".", 1)[-1] for one in listed]
        strange = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
        if strange or "Pooling" not in kinds:
            raise ModelError(
                f"{spec.source}: modules.json asks for {strange[0] if strange else 'no pooling'}, which is not done here; choose "
                "a model that takes the mean, the first or the last token, or say how where pooling and normalise can be set"
            )
        path = str(listed[kinds.index("Pooling")].get("path", path))
        normalised = "Normalize" in kinds
    name = f"{path}/config.json"
    settings = read_part(spec.source, name, events)
    if settings is None and modules is None:
        last = spec.kind == "decoder"
        own = spec.pooling if spec.task in ("classify", "regress") else ("last" if last else "mean")
        return Manner(own, False)
    settings = settings if isinstance(settings, dict) else {}
    asked = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    asked = [str(settings["pooling_mode"])] if not asked and "pooling_mode" in settings else asked
    if len(asked) != 1 or asked[0] not in WAYS:
        raise ModelError(
            f"{spec.source}: {name} asks for {', '.join(asked) or 'nothing'}, which is not done here; choose a model that takes "
            "the mean, the first or the last token, or say how where pooling and normalise can be set"
        )
    return Manner(WAYS[asked[0]], normalised)


def read_part(source: str, name: str, events: Events | None = None) -> object:
    """A JSON file of a model; None where there is none, and with a warning where the hub would have to say so and is not
    reached. Raises ModelError for one that cannot be fetched or read."""
    place = resolve_source(source)
    if isinstance(place, Path):
        path = place / name
    else:
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(place, name))
        except LocalEntryNotFoundError:
            # The cache knows of a file that was asked for before and is not there.
            if try_to_load_from_cache(place, name) is not _CACHED_NO_EXIST and events is not None:
                events.warn(
                    f"{place}: {name} is not in the local cache and cannot be fetched, so it is taken as not there"
                )
            return None
        except EntryNotFoundError:
            return None
        except Exception as err:  # as many classes as the hub's client has versions
            raise ModelError(f"{place}: {name} cannot be fetched ({type(err).__name__}); give a directory") from None
    if not path.is_file():
        return None
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ModelError(f"{path}: cannot be read ({type(err).__name__}); fetch the model again") from None
    return found
