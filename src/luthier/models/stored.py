"""What the files of a model hold: whether bf16 is enough for every number in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def fits_bfloat16(place: Path | str, hub: dict[str, Any]) -> bool:
    """Whether reading a model's safetensors files in bf16 rounds nothing: all weights are in it, or every number of those that
    are in another precision is one of its own. False where there are no such files."""
    from safetensors import safe_open

    found = False
    for path in _files(place, hub):
        found = True
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                if file.get_slice(name).get_dtype() not in ("F64", "F32", "F16"):
                    continue
                held = file.get_tensor(name)
                if not torch.equal(held.bfloat16().to(held.dtype), held):
                    return False
    return found


def _files(place: Path | str, hub: dict[str, Any]) -> Iterator[Path]:
    if isinstance(place, Path):
        yield from sorted(place.glob("*.safetensors"))
        return
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    missing = {"_raise_exceptions_for_missing_entries": False}
    if (whole := cached_file(place, FILE, **hub, **missing)) is not None:
        yield Path(whole)
    elif (index := cached_file(place, INDEX, **hub, **missing)) is not None:
        yield from map(Path, get_checkpoint_shard_files(place, index, **hub)[0])
