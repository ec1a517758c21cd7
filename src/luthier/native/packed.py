"""A decoder packed for this processor: its weights, and what adapters add, as decoder.c reads them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.native.forms import BITS, GROUP, Form, filled, to_int4, to_int8
from luthier.native.library import (
    LANE,
    TOKENS,
    CDecoder,
    CLayer,
    CLow,
    CLowSet,
    CNorm,
    CProduct,
    Pages,
    decoder_library,
)
from luthier.native.shape import ACTIVATIONS, PRODUCTS, Decoder, Linear, Low, Norm

# Rows of a weight that are packed at once, so that what is between takes little; whole tiles.
AT_ONCE = 1024
# Bytes of weights that are asked for at once.
CHUNK = 2**23
Kept: TypeAlias = Literal["bfloat16", "int8"]
NORMS = {None: 0, "rms": 1, "layer": 2}


def pack_tiles(weight_NK: Tensor, form: Form, to: int) -> Tensor | None:
    """Write whole tiles of a weight to an address; their scales, where the form has any."""
    library, (n, k) = decoder_library(), weight_NK.shape
    if form == "bfloat16":
        made_NK, pack, scale = weight_NK.bfloat16(), library.pack_halves, None
    elif form == "int8":
        (made_NK, scale), pack = to_int8(weight_NK), library.pack_bytes
    else:
        (made_NK, scale_NG), pack = to_int4(weight_NK), library.pack_nibbles
        lanes = library.decoder_lanes()
        scale = scale_NG.view(n // lanes, lanes, k // GROUP).transpose(1, 2)
    # Held by a name until it is packed: an address keeps no tensor.
    made_NK = made_NK.contiguous()
    pack(made_NK.data_ptr(), to, n, k)
    return scale


def pack_rounded(weight_NK: Tensor, to: int, k: int) -> Tensor:
    """Write rows in bf16 as whole tiles of bytes to an address, filled up to `k` columns, without anything between; their
    scales."""
    rows, given = weight_NK.shape
    scale = torch.empty(rows + -rows % LANE)
    if decoder_library().pack_rounded(
        weight_NK.data_ptr(), to, scale.data_ptr(), rows, given, weight_NK.stride(0), len(scale), k
    ):
        raise MemoryError("no memory for the rows that are packed")
    return scale


class Packed:
    """The weights of a decoder in one form, as the C code reads them. Takes what it needs besides the decoder's own tensors;
    the head of int4 is int8, since it decides every token. `let_go` is called whenever a part of those was packed. Keys and
    values are `kept` in bytes beside whole numbers, else in bf16, until that is set otherwise."""

    def __init__(self, decoder: Decoder, form: Form, let_go: Callable[[], None] = lambda: None):
        self.decoder, self.form = decoder, form
        self.kept: Kept = "bfloat16" if form == "bfloat16" else "int8"
        self.nbytes = 0
        self._let_go, self._unasked = let_go, 0
        # What it changes of the model's predictions, once that was measured (`engine.native.Quality`).
        self.quality: Any = None
        self._held: list[Any] = []
        self._chunk, self._left = 0, 0
        # By their numbers in a step; None where one was taken out.
        self.adapters: list[Adapter | None] = []
        self._sets: list[Any] = []
        self._tables: dict[Any, tuple[int, Tensor, Tensor]] = {}
        self._reached = 0
        # Where the layers were told that their keys and values lie.
        self.told: tuple[int, int, Kept] | None = None
        # A step is told by the layers where its keys and values lie, so one goes through at a time.
        self.lock = threading.Lock()
        embedding_VE = self._hold(decoder.embedding_VE.bfloat16())
        places_PE = None if decoder.places_PE is None else self._hold(decoder.places_PE.float())
        self._layers = (CLayer * len(decoder.blocks))()
        for layer, block in zip(self._layers, decoder.blocks):
            for name in ("before_attention", "query", "key", "after_attention", "before_mlp", "after_mlp"):
                setattr(layer, name, self._norm(getattr(block, name)))
            for name in PRODUCTS:
                setattr(layer, name, self._product(getattr(block, name), form))
            layer.window = block.window or 0
            let_go()
        head_form: Form = "int8" if form == "int4" else form
        inner = self._layers[0].up.n
        self.c = CDecoder(
            width=decoder.width, heads=decoder.heads, kv=decoder.kv, size=decoder.size, turned=decoder.turned,
            inner=decoder.blocks[0].down.weight().shape[1], layers=len(decoder.blocks), gated=int(decoder.gated),
            activation=ACTIVATIONS.index(decoder.activation), parallel=int(decoder.parallel), scale=decoder.scale,
            softcap=decoder.softcap or 0.0, residual=decoder.residual, embedding_scale=decoder.embedding_scale,
            embedding=embedding_VE.data_ptr(), places=None if places_PE is None else places_PE.data_ptr(),
            last=self._norm(decoder.last), head=self._product(decoder.head, head_form, end=True),
            head_scale=decoder.head_scale, head_softcap=decoder.head_softcap or 0.0, layer=self._layers,
        )  # fmt: skip
        assert inner >= self.c.inner * (1 + self.c.gated)
        let_go()

    def _hold(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._held.append(tensor)
        return tensor

    def _take(self, size: int) -> int:
        """Room for a weight: one after another, as they are read."""
        size = -(-size // 64) * 64
        if size > self._left:
            pages = Pages(max(size, CHUNK))
            self._held.append(pages)
            self._chunk, self._left = pages.at, pages.bytes
        self._chunk, self._left = self._chunk + size, self._left - size
        self.nbytes += size
        return self._chunk - size

    def _ask(self, size: int) -> None:
        """So many bytes of a weight were read: those of a file need not all be in memory at once."""
        self._unasked += size
        if self._unasked >= CHUNK:
            self._unasked = 0
            self._let_go()

    def _norm(self, norm: Norm | None) -> CNorm:
        if norm is None:
            return CNorm()
        weight_E = self._hold(norm.weight_E.float())
        bias_E = None if norm.bias_E is None else self._hold(norm.bias_E.float())
        return CNorm(NORMS[norm.kind], norm.eps, weight_E.data_ptr(), None if bias_E is None else bias_E.data_ptr())

    def _product(self, linear: Linear, form: Form, end: bool = False) -> CProduct:
        parts = list(linear.parts())
        if not parts or any(len(part_NK) % LANE for part_NK in parts[:-1]):
            parts = [linear.weight()]
        rows, bits = sum(map(len, parts)), BITS[form]
        if end:
            self.vocabulary = rows
        n, k = rows + -rows % LANE, filled(parts[0][:1], form).shape[1]
        made, scales, done = self._take(n * k * bits // 8), [], 0
        for weight_NK in parts:
            for some_NK in torch.split(weight_NK, AT_ONCE):
                at = made + done * k * bits // 8
                if form == "int8" and some_NK.dtype == torch.bfloat16 and some_NK.stride(1) == 1:
                    scales.append(pack_rounded(some_NK, at, k))
                else:
                    scale = pack_tiles(filled(some_NK, form), form, at)
                    if scale is not None:
                        scales.append(scale)
                done += len(some_NK)
                self._ask(some_NK.nbytes)
        scale = self._hold(torch.cat(scales)) if scales else None
        bias = None
        if linear.bias_N is not None or (end and n > rows):
            filled_N = torch.zeros(n)
            if linear.bias_N is not None:
                filled_N[:rows] = linear.bias_N.float()
            if end:
                # What only fills the last tile up is no token.
                filled_N[rows:] = -torch.inf
            bias = self._hold(filled_N).data_ptr()
        address = None if scale is None else scale.data_ptr()
        return CProduct(n, k, bits, made, address if bits == 8 else None, address if bits == 4 else None, bias)

    @property
    def kept_bytes(self) -> int:
        """Bytes that the keys and values of a token take."""
        return len(self.decoder.blocks) * sum(block_bytes(self.decoder, self.kept)) // TOKENS

    def take_adapters(self, decoders: Sequence[Decoder]) -> None:
        """What the adapters of these add, each a decoder over this base that keeps its own apart; in place of all before."""
        made = [
            Adapter([{name: getattr(block, name).lows() for name in PRODUCTS} for block in one.blocks])
            for one in decoders
        ]
        with self.lock:
            self._set_adapters([*made])

    def put_adapter(self, lows: Sequence[Lows]) -> int:
        """One adapter more, by what it adds to each layer; its number in a step. Raises ValueError for outputs that are no
        whole tiles."""
        made = Adapter(lows)
        with self.lock:
            free = self.adapters.index(None) if None in self.adapters else len(self.adapters)
            self._set_adapters([*self.adapters[:free], made, *self.adapters[free + 1 :]])
        return free

    def drop_adapter(self, number: int) -> None:
        """Take one out; the numbers of the others stay."""
        with self.lock:
            left = [None if at == number else one for at, one in enumerate(self.adapters)]
            while left and left[-1] is None:
                left.pop()
            self._set_adapters(left)

    def _set_adapters(self, adapters: list[Adapter | None]) -> None:
        self.adapters = adapters
        self._sets = []
        for at, layer in enumerate(self._layers):
            for name in PRODUCTS:
                sets = (CLowSet * len(adapters))(
                    *(CLowSet() if one is None else one.sets[at][name] for one in adapters)
                )
                self._sets.append(sets)
                setattr(layer, f"low_{name}", ctypes.addressof(sets) if adapters else None)

    def reach(self, places: int) -> None:
        """Make the tables of rotary positions long enough for so many places."""
        if places <= self._reached:
            return
        for layer, block in zip(self._layers, self.decoder.blocks):
            if block.turns is None:
                continue
            known = self._tables.get(block.turns)
            if known is None or known[0] < places:
                # Twice as far each time, or a long text would make them anew for every token.
                count = max(places, min(2 * places, block.turns.longest))
                cosine, sine = (one.float().contiguous() for one in block.turns.tables(count))
                known = self._tables[block.turns] = (count, cosine, sine)
            layer.cosine, layer.sine = known[1].data_ptr(), known[2].data_ptr()
        # Where no layer turns anything, no place is too far.
        self._reached = min((known[0] for known in self._tables.values()), default=2**62)


Lows: TypeAlias = Mapping[str, Sequence[Low]]
"""What an adapter adds to the products of a layer, by their names."""


class Adapter:
    """What a decoder's adapter adds, packed: (A, B) of each layer in each product."""

    def __init__(self, layers: Sequence[Lows]):
        self._held: list[Tensor] = []
        self.width = 0
        self.sets = [{name: self._set(lows.get(name, ())) for name in PRODUCTS} for lows in layers]

    def _set(self, lows: Sequence[Low]) -> CLowSet:
        made, width = CLowSet(), 0
        for at, low in enumerate(lows):
            if low.start % LANE or low.stop % LANE:
                raise ValueError(f"outputs from {low.start} to {low.stop} are no whole tiles of {LANE}")
            rank = -(-low.a_RK.shape[0] // LANE) * LANE
            a_RK = F.pad(low.a_RK.bfloat16(), (0, 0, 0, rank - low.a_RK.shape[0]))
            b_NR = F.pad(low.b_NR.bfloat16(), (0, rank - low.b_NR.shape[1]))
            made.part[at] = CLow(low.start, low.stop, rank, self._pack(a_RK), self._pack(b_NR))
            made.parts = at + 1
            width += rank
        self.width = max(self.width, width)
        return made

    def _pack(self, weight_NK: Tensor) -> int:
        weight_NK = weight_NK.contiguous()
        packed = torch.empty_like(weight_NK)
        decoder_library().pack_halves(weight_NK.data_ptr(), packed.data_ptr(), *weight_NK.shape)
        self._held.append(packed)
        return packed.data_ptr()


def block_bytes(decoder: Decoder, kept: Kept) -> tuple[int, int]:
    """Bytes that the keys and the values of a block take in one layer. In bytes, the scales of both lie behind the keys."""
    numbers = TOKENS * decoder.kv * decoder.size * BITS[kept] // 8
    return numbers + (2 * TOKENS * decoder.kv * 4 if kept == "int8" else 0), numbers
