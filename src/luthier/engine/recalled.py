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
from dataclasses import asdict
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from luthier.core.events import Events
from luthier.engine.layout import lay_out, rebuild
from luthier.engine.native import Quality, calibration_ids, limits
from luthier.models.facts import base_fingerprint
from luthier.models.lean import Undrawn
from luthier.models.mapped import Files, letting_go, read_regions
from luthier.models.origin import Origin, read_config, read_tokenizer
from luthier.models.rendering import checked_renderer
from luthier.models.sources import cached_snapshot, current_snapshot, resolve_source, settle
from luthier.models.spec import LoadedModel, ModelSpec, read_spec
from luthier.models.stored import find_twins
from luthier.native.build import NoLibrary, cache_directory, library_path
from luthier.native.cached import Cached
from luthier.native.library import TOKENS
from luthier.native.packed import Packed

# Rows of logits that are kept, the last ones, and of each so many numbers.
ROWS, NUMBERS = 4, 512
# Models of which something is kept: the newest.
MODELS = 64
# The sources on which it depends what is found.
CODE = ("native", "models", "engine")
STALE = "what was kept of this model's packed weights does not fit them, so all is read and measured anew"


class Recalled(LoadedModel):
    """A model of which there are packed weights alone; what they are called and how large they are is read from its config where
    something asks for its module."""

    def __init__(self, place: Path, vocabulary: int, **known: Any):
        self._place, self._vocabulary = place, vocabulary
        self._hollow: nn.Module | None = None
        super().__init__(module=nn.Module(), packed_only=True, **known)

    @property
    def module(self) -> nn.Module:
        """Without numbers: what `let_go` leaves of a module, and no more memory than that."""
        if self._hollow is None:
            self._hollow = _hollow(self._place, self.config)
        return self._hollow

    @module.setter
    def module(self, made: nn.Module) -> None:
        self._hollow = None

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        return read_config(self._place, {})

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
        """Whether something asked for its module by now."""
        return self._hollow is not None


def recall(
    source: str, execution: str, events: Events, *, max_length: int | None = None, truncate: bool = False
) -> Recalled | None:
    """The model at `source`, packed as it was before; None where nothing is kept of it, or not of these files. Raises as
    `load_model` does where it is not found, or its tokenizer or its texts are not what they were."""
    source = settle(source)
    place = resolve_source(source)
    # A hub id has no description of ours beside it, as when it is loaded.
    folder = place if isinstance(place, Path) else current_snapshot(place)
    found = None if folder is None else _find(folder, execution, max_length)
    if folder is None or found is None:
        return None
    kept, stamp = found
    if not kept.is_file():
        return None
    try:
        held, tensors = _read(kept)
        if held["stamp"] != stamp:
            return None
        files = Files()
        decoder = rebuild(held["decoder"], tensors, files)
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
    if held["weights"] is not None:
        events.choose("weights", *held["weights"])
    saved, spec = read_spec(folder), ModelSpec.model_validate(held["spec"] | {"source": source})
    saved = saved if isinstance(place, Path) else None
    tokenizer = read_tokenizer(Origin(source, folder, saved, None, folder, source, {}, None, spec.kind))
    spec, renderer = checked_renderer(folder, tokenizer, spec, saved, truncate=truncate, events=events)
    return Recalled(
        folder, decoder.embedding_VE.shape[0], tokenizer=tokenizer, spec=spec, renderer=renderer, native=packed,
        fingerprint=held["fingerprint"], **held["found"],
    )  # fmt: skip


def keep(model: LoadedModel, source: str, execution: str, events: Events, *, max_length: int | None = None) -> bool:
    """Keep what was found of a model that was loaded and packed, before its own weights are let go; False where they lie in no
    file, or there is no room. `events` are those of its loading."""
    if model.native is None or model.packed_only or model.native.adapters:
        return False
    place = resolve_source(settle(source))
    folder = place if isinstance(place, Path) else cached_snapshot(place)
    found = None if folder is None else _find(folder, execution, max_length)
    if folder is None or found is None:
        return False
    regions = read_regions()
    described = lay_out(model.native.decoder, regions)
    if described is None:
        # Looking at all numbers takes a while, so it comes last.
        described = lay_out(model.native.decoder, regions, find_twins(model.network, folder))
    if described is None:
        return False
    path, stamp = found
    layout, tensors = described
    packed: Packed = model.native
    ids, weights = calibration_ids(model)[:TOKENS], events.choices.get("weights")
    held = {
        "stamp": stamp,
        "form": packed.form,
        "kept": packed.kept,
        "quality": asdict(packed.quality),
        "decoder": layout,
        "ids": ids,
        "spec": model.spec.model_dump(mode="json"),
        "fingerprint": base_fingerprint(model, letting_go(model.network)),
        "weights": None if weights is None else weights.split(": ", 1),
        "found": {"packs": model.packs, "pages": model.pages, "shares": model.shares, "as_stored": model.as_stored},
    }
    # Full disks and places where nothing may be written cost time at the next loading, and nothing else.
    with contextlib.suppress(OSError):
        _write(path, held, {**tensors, "tried": _tried(packed, ids)})
        return True
    return False


def _hollow(place: Path, config: Any) -> nn.Module:
    from luthier.models.load import load_network

    # In torch's own precision: while another is set for it, all threads would make their numbers in that.
    with torch.device("meta"), Undrawn():
        network = load_network(place, config, "causal", {}, dtype="float32", from_scratch=True, events=Events())
    made: nn.Module = network.eval()
    return made


def _find(place: Path, execution: str, max_length: int | None) -> tuple[Path, str] | None:
    """Where what is kept of the model in a folder lies, and what that must be of."""
    try:
        library = library_path("decoder")
        stats = [(one.name, one.stat()) for one in sorted(place.iterdir())]
    except (NoLibrary, OSError):
        return None
    files = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]
    stamp = json.dumps([files, library.name, limits(), _versions(), _code()])
    which = json.dumps([str(place.resolve()), execution, max_length])
    name = f"{hashlib.sha256(which.encode()).hexdigest()[:24]}.safetensors"
    return cache_directory() / "packed" / name, _digest(stamp)


@cache
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
