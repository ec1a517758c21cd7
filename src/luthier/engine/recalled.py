"""A model that was packed before, packed again straight from its files: no module is built, nothing is measured anew.

Packing reads off a model what it computes and measures what the packed weights change (`engine.native`): both need the model
itself, whose module and passes are most of the time and of the memory until the first token. What was found is kept in the
cache, small: where each weight lies in the files, norms and numbers, and the last logits that the packed weights gave for the
beginning of the calibration text. It holds for those very files, settings, versions and code. Weights packed from it must give
the same logits bit for bit, or all is read and measured anew, with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from luthier.core.events import Events
from luthier.engine.native import Quality, calibration_ids, limits, say_packed
from luthier.models.facts import base_fingerprint
from luthier.models.mapped import Files, Place, place_of, read_regions
from luthier.models.purpose import make_renderer
from luthier.models.rendering import check_rendering
from luthier.models.sources import resolve_source, settle
from luthier.models.spec import LoadedModel, ModelSpec, read_spec
from luthier.native.build import NoLibrary, cache_directory, library_path
from luthier.native.decoder import TOKENS, Cached, Packed
from luthier.native.shape import PRODUCTS, Block, Decoder, Linear, Norm, Turns

NORMS = ("before_attention", "query", "key", "after_attention", "before_mlp", "after_mlp")
# Rows of logits that are kept, the last ones, and of each so many numbers.
ROWS, NUMBERS = 4, 512
# Models of which something is kept: the newest.
MODELS = 64
# The sources on which it depends what is found.
CODE = ("native", "models", "engine")
STALE = "what was kept of this model's packed weights does not fit them, so all is read and measured anew"


class Recalled(LoadedModel):
    """A model whose packed weights are there; its module is loaded where something asks for it."""

    def __init__(self, load: Callable[[], LoadedModel], vocabulary: int, **known: Any):
        self._load, self._vocabulary = load, vocabulary
        self._loaded: nn.Module | None = None
        super().__init__(module=nn.Module(), **known)

    @property
    def module(self) -> nn.Module:
        """Loaded when it is first asked for."""
        if self._loaded is None:
            self._loaded = self._load().module
        return self._loaded

    @module.setter
    def module(self, made: nn.Module) -> None:
        self._loaded = None

    @property
    def device(self) -> torch.device:
        """Packed weights are the processor's."""
        return torch.device("cpu")

    @property
    def vocabulary(self) -> int:
        """Tokens that it embeds."""
        return self._vocabulary

    @property
    def has_module(self) -> bool:
        """Whether the module was loaded by now."""
        return self._loaded is not None


def recall(
    source: str, execution: str, events: Events, *, max_length: int | None = None, truncate: bool = False
) -> Recalled | None:
    """The model at `source`, packed as it was before; None where nothing is kept of it, or not of these files. Raises as
    `load_model` does where its tokenizer or its texts are not what they were."""
    source = settle(source)
    found = _find(source, execution, max_length)
    if found is None:
        return None
    place, kept, stamp = found
    if not kept.is_file():
        return None
    try:
        held, tensors = _read(kept)
        if held["stamp"] != stamp:
            return None
        files = Files()
        decoder = _rebuild(held["decoder"], tensors, files)
        packed = Packed(decoder, held["form"], files.let_go)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
        # Cut off or of another version.
        events.warn(STALE)
        return None
    packed.kept, packed.quality = held["kept"], Quality(**held["quality"])
    if not torch.equal(_tried(packed, held["ids"]), tensors["tried"]):
        events.warn(STALE)
        return None
    files.let_go()
    from luthier.models.load import load_model
    from luthier.models.origin import Origin, read_tokenizer

    saved, spec = read_spec(place), ModelSpec.model_validate(held["spec"] | {"source": source})
    tokenizer = read_tokenizer(Origin(source, place, saved, None, place, source, {}, None, spec.kind))
    if saved is not None:
        check_rendering(place, source, tokenizer, saved)
    spec, renderer = make_renderer(
        tokenizer,
        spec,
        saved.template if saved else None,
        template="auto",
        truncate=truncate,
        learn="all",
        events=events,
    )
    load = partial(load_model, source, max_length=max_length, truncate=truncate, device="cpu", as_stored=True)
    model = Recalled(
        load, decoder.embedding_VE.shape[0], tokenizer=tokenizer, spec=spec, renderer=renderer, as_stored=True,
        native=packed, fingerprint=held["fingerprint"], **held["found"],
    )  # fmt: skip
    say_packed(packed, events)
    return model


def keep(model: LoadedModel, source: str, execution: str, *, max_length: int | None = None) -> bool:
    """Keep what was found of a model that was packed from its files as they are; False where its weights lie elsewhere, or
    there is no room."""
    if model.native is None or not model.as_stored or isinstance(model, Recalled) or model.native.adapters:
        return False
    found = _find(source, execution, max_length)
    described = None if found is None else _describe(model.native.decoder)
    if found is None or described is None:
        return False
    _, path, stamp = found
    layout, tensors = described
    packed: Packed = model.native
    ids = calibration_ids(model)[:TOKENS]
    held = {
        "stamp": stamp,
        "form": packed.form,
        "kept": packed.kept,
        "quality": asdict(packed.quality),
        "decoder": layout,
        "ids": ids,
        "spec": model.spec.model_dump(mode="json"),
        "fingerprint": base_fingerprint(model),
        "found": {"packs": model.packs, "pages": model.pages, "shares": model.shares},
    }
    # Full disks and places where nothing may be written cost time at the next loading, and nothing else.
    with contextlib.suppress(OSError):
        _write(path, held, {**tensors, "tried": _tried(packed, ids)})
        return True
    return False


def _find(source: str, execution: str, max_length: int | None) -> tuple[Path, Path, str] | None:
    """The directory, where what is kept of it lies, and what that must be of."""
    place = resolve_source(source)
    if not isinstance(place, Path):
        return None
    try:
        library = library_path("decoder")
        stats = [(one.name, one.stat()) for one in sorted(place.iterdir())]
    except (NoLibrary, OSError):
        return None
    files = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]
    stamp = json.dumps([files, library.name, limits(), _versions(), _code()])
    which = json.dumps([str(place.resolve()), execution, max_length])
    return (
        place,
        cache_directory() / "packed" / f"{hashlib.sha256(which.encode()).hexdigest()[:24]}.safetensors",
        _digest(stamp),
    )


def _versions() -> list[str]:
    return [version(name) for name in ("torch", "transformers", "safetensors", "tokenizers")]


def _code() -> str:
    here = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((here / folder).glob("*.py")):
            stat = path.stat()
            digest.update(f"{path}{stat.st_size}{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["held"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _write(path: Path, held: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        side = Path(folder) / path.name
        side.write_bytes(save(tensors, {"held": json.dumps(held)}))
        os.replace(side, path)
    held_files = sorted(path.parent.glob("*.safetensors"), key=lambda one: one.stat().st_mtime_ns)
    for old in held_files[:-MODELS]:
        old.unlink(missing_ok=True)


def _tried(packed: Packed, ids: list[int]) -> Tensor:
    """Of the last logits for these tokens, numbers from all over the vocabulary."""
    cached, rows = Cached(packed, 1), list(range(max(0, len(ids) - ROWS), len(ids)))
    logits_RV = cached.read(ids, [[0]], [0], [len(ids)], rows)
    return logits_RV[:, :: max(1, packed.vocabulary // NUMBERS)].contiguous()


def _describe(decoder: Decoder) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """A decoder as JSON and small tensors; None where a weight lies in no file, or places are turned in a way of their own."""
    regions = read_regions()
    tensors: dict[str, Tensor] = {}

    def tensor(made: Tensor) -> str:
        name = str(len(tensors))
        tensors[name] = made.detach().clone().contiguous()
        return name

    def placed(made: Tensor) -> dict[str, Any]:
        place = place_of(made, regions)
        if place is None:
            raise _Elsewhere
        return asdict(place)

    def norm(one: Norm | None) -> dict[str, Any] | None:
        if one is None:
            return None
        bias = None if one.bias_E is None else tensor(one.bias_E)
        return {"kind": one.kind, "eps": one.eps, "weight_E": tensor(one.weight_E), "bias_E": bias}

    def linear(one: Linear) -> dict[str, Any]:
        parts = one.parts()
        if not parts:
            raise _Elsewhere
        bias = None if one.bias_N is None else tensor(one.bias_N)
        return {"parts": [placed(part) for part in parts], "bias_N": bias}

    turns: dict[int, dict[str, Any]] = {}
    try:
        for block in decoder.blocks:
            if block.turns is not None and id(block.turns) not in turns:
                turns[id(block.turns)] = {
                    "at": len(turns),
                    "longest": block.turns.longest,
                    **_speeds(block.turns, tensor),
                }
        layout: dict[str, Any] = {
            one.name: getattr(decoder, one.name)
            for one in fields(Decoder)
            if one.name not in ("blocks", "embedding_VE", "places_PE", "last", "head")
        }
        if not all(one is None or isinstance(one, str | int | float) for one in layout.values()):
            raise _Elsewhere
        layout |= {
            "embedding_VE": placed(decoder.embedding_VE),
            "places_PE": None if decoder.places_PE is None else placed(decoder.places_PE),
            "last": norm(decoder.last),
            "head": linear(decoder.head),
            "turns": list(turns.values()),
            "blocks": [
                {
                    **{name: linear(getattr(block, name)) for name in PRODUCTS},
                    **{name: norm(getattr(block, name)) for name in NORMS},
                    "turns": None if block.turns is None else turns[id(block.turns)]["at"],
                    "window": block.window,
                }
                for block in decoder.blocks
            ],
        }
    except _Elsewhere:
        return None
    return layout, tensors


class _Elsewhere(Exception):
    """Something of a decoder lies in no file."""


def _speeds(turns: Turns, tensor: Callable[[Tensor], str]) -> dict[str, Any]:
    """Raises _Elsewhere where all tables are not what their speeds give, to the last bit."""
    if turns.speeds is None or not turns.longest:
        raise _Elsewhere
    speeds = turns.speeds[0].detach().clone(), float(turns.speeds[1])
    for count in {turns.longest, min(turns.longest, TOKENS)}:
        if not all(map(torch.equal, turns.tables(count), _turn(*speeds, count))):
            raise _Elsewhere
    return {"speeds": [tensor(speeds[0]), speeds[1]]}


def _turn(speeds_D: Tensor, scale: float, places: int) -> tuple[Tensor, Tensor]:
    angles_PD = torch.outer(torch.arange(places).float(), speeds_D.float())
    return angles_PD.cos() * scale, angles_PD.sin() * scale


def _rebuild(layout: dict[str, Any], tensors: dict[str, Tensor], files: Files) -> Decoder:
    def placed(place: dict[str, Any] | None) -> Tensor | None:
        if place is None:
            return None
        return files.tensor(Place(**{**place, "shape": tuple(place["shape"]), "strides": tuple(place["strides"])}))

    def norm(one: dict[str, Any] | None) -> Any:
        if one is None:
            return None
        bias = None if one["bias_E"] is None else tensors[one["bias_E"]]
        return Norm(one["kind"], one["eps"], tensors[one["weight_E"]], bias)

    def linear(one: dict[str, Any]) -> Linear:
        def parts() -> list[Any]:
            return [placed(part) for part in one["parts"]]

        bias = None if one["bias_N"] is None else tensors[one["bias_N"]]
        return Linear(lambda: parts()[0] if len(one["parts"]) == 1 else torch.cat(parts()), bias, parts=parts)

    turns = []
    for one in layout["turns"]:
        speeds = tensors[one["speeds"][0]], one["speeds"][1]
        turns.append(Turns(partial(_turn, *speeds), one["longest"], speeds))

    def parts_of(one: dict[str, Any]) -> dict[str, Any]:
        return {
            **{name: linear(one[name]) for name in PRODUCTS},
            **{name: norm(one[name]) for name in NORMS},
        }

    blocks = tuple(
        Block(
            **parts_of(one),
            turns=None if one["turns"] is None else turns[one["turns"]],
            window=one["window"],
        )
        for one in layout["blocks"]
    )
    plain = {one.name: layout[one.name] for one in fields(Decoder) if one.name != "blocks"}
    plain |= {name: placed(layout[name]) for name in ("embedding_VE", "places_PE")}
    return Decoder(blocks=blocks, **{**plain, "last": norm(layout["last"]), "head": linear(layout["head"])})
