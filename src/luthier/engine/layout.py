"""A decoder as JSON and small tensors, which say where in the files of its model each of its weights lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luthier.models.mapped import Files, Place, Region, Twin, place_of
from luthier.native.library import TOKENS
from luthier.native.shape import PRODUCTS, Block, Decoder, Linear, Norm, Turns

NORMS = ("before_attention", "query", "key", "after_attention", "before_mlp", "after_mlp")


def lay_out(
    decoder: Decoder, regions: Sequence[Region], twins: Sequence[Twin] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """A decoder as JSON and small tensors; None where a weight lies in none of these regions of files and is no twin of what
    does, or places are turned in a way of their own."""
    tensors: dict[str, Tensor] = {}

    def tensor(made: Tensor) -> str:
        name = str(len(tensors))
        tensors[name] = made.detach().clone().contiguous()
        return name

    def placed(made: Tensor) -> dict[str, Any]:
        place = place_of(made, regions, twins)
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


def rebuild(layout: dict[str, Any], tensors: dict[str, Tensor], files: Files) -> Decoder:
    """The decoder that was laid out so. Raises as `Files.tensor` does, and KeyError and TypeError for what is no layout."""

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
