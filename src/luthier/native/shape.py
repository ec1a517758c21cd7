"""What a decoder computes, as weights and numbers: what `native.packed` packs and `native.plain` follows in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

Activation: TypeAlias = Literal["silu", "gelu_tanh", "gelu", "relu", "relu_squared"]
# The products of a layer, in the order in which they are made.
PRODUCTS = ("qkv", "out", "up", "down")
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu", "relu", "relu_squared")


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """RMS norm, or layer norm with its bias; the weight is what is multiplied with."""

    kind: Literal["rms", "layer"]
    eps: float
    weight_E: Tensor
    bias_E: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Low:
    """What an adapter adds to the outputs from `start` to `stop`: B A x, with its scale in B."""

    start: int
    stop: int
    a_RK: Tensor
    b_NR: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = x W.T + b; `weight` gives W [out, in] when it is asked for, and `lows` what an adapter adds that is kept apart.
    `parts`: what W is put together from, one below the other, without copying any of it; none where that is not known."""

    weight: Callable[[], Tensor]
    bias_N: Tensor | None = None
    lows: Callable[[], Sequence[Low]] = tuple
    parts: Callable[[], Sequence[Tensor]] = tuple


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """Rotary positions: cosine and sine [P, turned / 2] of the first P places, of which there are `longest` at most.
    `speeds`: by what a place is multiplied for its angles [turned / 2], and what cosine and sine are multiplied by; None where
    they may be made otherwise."""

    tables: Callable[[int], tuple[Tensor, Tensor]]
    longest: int = 0
    speeds: tuple[Tensor, float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A layer. `qkv` gives the heads of queries, keys and values one after another, `up` the gate and what it opens, or what
    the activation is of. A token sees itself and the window - 1 before it. Norms of queries and keys are of each head."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    before_attention: Norm | None = None
    query: Norm | None = None
    key: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    turns: Turns | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """A decoder-only model whose layers are alike. `parallel`: both branches of a layer read what comes into it."""

    blocks: tuple[Block, ...]
    heads: int
    kv: int
    size: int
    scale: float
    activation: Activation
    gated: bool
    embedding_VE: Tensor
    last: Norm
    head: Linear
    softcap: float | None = None
    parallel: bool = False
    residual: float = 1.0
    embedding_scale: float = 1.0
    places_PE: Tensor | None = None
    head_scale: float = 1.0
    head_softcap: float | None = None

    @property
    def width(self) -> int:
        """Of a token's state."""
        return int(self.embedding_VE.shape[1])

    @property
    def turned(self) -> int:
        """How many numbers of a head have positions."""
        turns = next((one.turns for one in self.blocks if one.turns is not None), None)
        return 0 if turns is None else 2 * int(turns.tables(1)[0].shape[1])
