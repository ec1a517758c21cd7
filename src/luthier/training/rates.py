"""At what share of the learning rate each weight learns: by its layer, and by what its adapter says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from luthier.core.errors import ConfigError, TrainingError
from luthier.training.optimizers.engine import EMBEDDINGS

# What families call their stack of layers: h (GPT-2), layer (BERT), layers (Llama, BART), block (T5).
LAYER = re.compile(r"(?:^|\.)(?:h|layers?|blocks?)\.(\d+)\.")


def layer_scales(names: Sequence[str], decay: float) -> dict[str, float]:
    """The scale of each name: `decay` to the power of how many layers lie between it and the last that learns.

    Layer-wise decay as for ULMFiT (Howard and Ruder 2018, arXiv:1801.06146) and ELECTRA (Clark et al. 2020,
    arXiv:2003.10555): the last layer and what comes after it learn at the full rate, each layer below at `decay` times
    the rate of the one above it, embeddings least. The encoder of an encoder-decoder lies below its decoder. Deviation:
    in ELECTRA the last layer itself learns one step slower than the head. Raises ConfigError when no name tells a layer.
    """
    if decay == 1:
        return {}
    depths = layer_depths(names)
    top = max(depths.values(), default=0)
    if top == 0:
        raise ConfigError(
            "layer_decay: no weight that learns belongs to a numbered layer, so no layer can learn slower than another; "
            "leave layer_decay at 1"
        )
    return {name: decay ** (top - depth) for name, depth in depths.items()}


def layer_depths(names: Iterable[str]) -> dict[str, int]:
    """How high each name lies: 0 for embeddings, from 1 for layers, that of the last layer for all that comes after."""
    names = list(names)
    found = {name: match for name in names if (match := LAYER.search(name))}
    lengths: dict[str, int] = {}
    for name, match in found.items():
        stack = name[: match.start(1)]
        lengths[stack] = max(lengths.get(stack, 0), int(match[1]) + 1)
    # An encoder is named before its decoder.
    below, starts = 0, {}
    for stack, length in lengths.items():
        starts[stack] = below
        below += length
    return {
        name: starts[name[: match.start(1)]] + int(match[1]) + 1
        if (match := found.get(name))
        else _outside(name, starts, lengths)
        for name in names
    }


def _outside(name: str, starts: Mapping[str, int], lengths: Mapping[str, int]) -> int:
    """Of a name in no layer: an embedding's 0, else the top of the stack beside it, else the top of all."""
    if any(table in name for table in EMBEDDINGS):
        return 0
    for stack in starts:
        owner = stack.rstrip(".").rpartition(".")[0]
        if owner and name.startswith(owner + "."):
            return starts[stack] + lengths[stack]
    return sum(lengths.values())


def combine(names: Sequence[str], *scales: Mapping[str, float]) -> dict[str, float]:
    """The product of several scales by name. Raises TrainingError when one names a weight that does not learn."""
    held, product = set(names), dict.fromkeys(names, 1.0)
    for one in scales:
        for name, scale in one.items():
            if name not in held:
                raise TrainingError(
                    f"a learning rate of its own was given to {name}, but no weight of that name learns; "
                    "please report it with the run's config.yaml"
                )
            product[name] *= scale
    return {name: scale for name, scale in product.items() if scale != 1.0}
