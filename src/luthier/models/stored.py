"""What the files of a model hold: whether bf16 is enough for every number in them, and which weights were cast from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from luthier.models.mapped import Files, Place, Twin

# As safetensors names them.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Numbers that are compared at once.
AT_ONCE = 2**22
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


def find_twins(network: Any, place: Path) -> list[Twin]:
    """The weights of `network` that were cast from those of the same name in the safetensors files at `place`: every number
    was compared."""
    held: dict[str, Place] = {}
    for path in sorted(place.glob("*.safetensors")):
        held |= _headed(path)
    files, found, prefix = Files(), [], f"{network.base_model_prefix}."
    for name, weight in network.named_parameters():
        place_there = next((held[one] for one in (name, name.removeprefix(prefix), prefix + name) if one in held), None)
        dtype = str(weight.dtype).removeprefix("torch.")
        if place_there is None or place_there.shape != tuple(weight.shape) or place_there.dtype == dtype:
            continue
        flat, own = files.tensor(place_there).reshape(-1), weight.detach()
        if own.is_contiguous() and all(
            torch.equal(one.to(weight.dtype), other)
            for one, other in zip(torch.split(flat, AT_ONCE), torch.split(own.view(-1), AT_ONCE))
        ):
            start = weight.data_ptr()
            found.append(Twin(start, start + weight.nbytes, place_there.offset, place_there.path, place_there.dtype))
        files.let_go()
    return found


def _headed(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file, by name."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    found = {}
    for name, one in header.items():
        if name != "__metadata__" and one["dtype"] in DTYPES:
            shape = tuple(one["shape"])
            strides = torch.empty(shape, device="meta").stride()
            found[name] = Place(
                str(path.resolve()), 8 + size + one["data_offsets"][0], DTYPES[one["dtype"]], shape, strides
            )
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
        yield from map(Path, get_checkpoint_shard_files(place, index, **hub)[0])  # type: ignore[no-untyped-call]
