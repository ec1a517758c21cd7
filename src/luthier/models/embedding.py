"""How a model makes one vector of a text, by what its own files say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import ModelError
from luthier.models.sources import resolve_source
from luthier.models.spec import LoadedModel, Pooling

# What sentence-transformers calls the ways of pooling that are done here.
WAYS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class Manner:
    """Pooling over the last hidden states, and whether the vector is scaled to length 1."""

    pooling: Pooling
    normalised: bool


def made_for_vectors(model: LoadedModel) -> bool:
    """Whether a model's own files say how it makes vectors (modules.json)."""
    return _read(model.spec.source, "modules.json") is not None


def manner_of(model: LoadedModel) -> Manner:
    """As modules.json of sentence-transformers says where there is one, read once; else a tuned head's pooling, the mean of an
    encoder, the last token of a decoder. Raises ModelError for files that ask for more than that."""
    if model.manner is None:
        model.manner = _read_manner(model)
    return model.manner  # type: ignore[no-any-return]


def _read_manner(model: LoadedModel) -> Manner:
    spec = model.spec
    modules: Any = _read(spec.source, "modules.json")
    if modules is None:
        last = spec.kind == "decoder"
        own = spec.pooling if spec.task in ("classify", "regress") else ("last" if last else "mean")
        return Manner(own, False)
    kinds = [str(one.get("type", "")).rsplit(".", 1)[-1] for one in modules]
    strange = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if strange or "Pooling" not in kinds:
        raise ModelError(
            f"{spec.source}: modules.json asks for {strange[0] if strange else 'no pooling'}, which is not done here; say how in "
            "pooling and normalise, or choose another model"
        )
    name = f"{modules[kinds.index('Pooling')]['path']}/config.json"
    settings: Any = _read(spec.source, name) or {}
    asked = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    asked = [str(settings["pooling_mode"])] if not asked and "pooling_mode" in settings else asked
    ways: dict[str, Pooling] = {**WAYS, "mean": "mean", "cls": "first", "lasttoken": "last"}
    if len(asked) != 1 or asked[0] not in ways:
        raise ModelError(
            f"{spec.source}: {name} asks for {', '.join(asked) or 'nothing'}, which is not done here; say how in "
            "pooling and normalise"
        )
    return Manner(ways[asked[0]], "Normalize" in kinds)


def _read(source: str, name: str) -> object:
    """A JSON file of a model; None where there is none."""
    place = resolve_source(source)
    if isinstance(place, str):
        from transformers.utils import cached_file

        found = cached_file(
            place,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        path = None if found is None else Path(found)
    else:
        path = place / name
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as err:
        raise ModelError(f"{path}: cannot be read ({type(err).__name__})") from None
