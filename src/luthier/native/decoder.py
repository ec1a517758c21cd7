"""A decoder packed for this processor, and its keys and values in blocks: the C of decoder.c behind a class."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.native.build import NoLibrary, load_library
from luthier.native.forms import BITS, GROUP, Form, filled, to_int4, to_int8
from luthier.native.shape import ACTIVATIONS, PRODUCTS, Decoder, Linear, Low, Norm
from luthier.native.tokens import Tokens, address, lay

# Tokens of a block of keys and values (TOKENS in the C files), and what rows are filled up to: the most numbers that any
# processor works on at once (LANE there).
TOKENS, LANE = 32, 16
# Rows of a weight that are packed at once, so that what is between takes little; whole tiles.
AT_ONCE = 1024
# Bytes of weights that are asked for at once.
CHUNK = 2**23
LONG, FLOAT, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
Kept: TypeAlias = Literal["bfloat16", "int8"]
NORMS = {None: 0, "rms": 1, "layer": 2}


class CNorm(ctypes.Structure):
    _fields_ = (("kind", LONG), ("eps", FLOAT), ("weight", POINTER), ("bias", POINTER))


class CProduct(ctypes.Structure):
    _fields_ = (("n", LONG), ("k", LONG), ("bits", LONG),
                ("weight", POINTER), ("scale", POINTER), ("scales", POINTER), ("bias", POINTER))  # fmt: skip


class CLow(ctypes.Structure):
    _fields_ = (("from", LONG), ("to", LONG), ("rank", LONG), ("a", POINTER), ("b", POINTER))


class CLowSet(ctypes.Structure):
    _fields_ = (("parts", LONG), ("part", CLow * 3))


class CLayer(ctypes.Structure):
    _fields_ = (
        *((name, CNorm) for name in ("before_attention", "query", "key", "after_attention", "before_mlp", "after_mlp")),
        *((name, CProduct) for name in PRODUCTS),
        ("cosine", POINTER), ("sine", POINTER), ("window", LONG), ("keys", POINTER), ("values", POINTER),
        *((f"low_{name}", POINTER) for name in PRODUCTS),
    )  # fmt: skip


class CDecoder(ctypes.Structure):
    _fields_ = (
        *((name, LONG) for name in ("width", "heads", "kv", "size", "turned", "inner", "layers", "gated", "activation",
                                    "parallel", "kept")),
        *((name, FLOAT) for name in ("scale", "softcap", "residual", "embedding_scale")),
        ("embedding", POINTER), ("places", POINTER), ("last", CNorm), ("head", CProduct),
        ("head_scale", FLOAT), ("head_softcap", FLOAT), ("layer", ctypes.POINTER(CLayer)),
    )  # fmt: skip


class CStep(ctypes.Structure):
    _fields_ = (
        *((name, LONG) for name in ("count", "wanted", "threads", "low")),
        *(
            (name, POINTER)
            for name in ("ids", "places", "first", "tables", "rows", "logits", "best", "adapters", "states")
        ),
    )


@cache
def _library() -> Any:
    library = load_library("decoder")
    library.take_pages.restype, library.take_pages.argtypes = POINTER, (ctypes.c_size_t,)
    library.give_pages.argtypes = (POINTER, ctypes.c_size_t)
    for name in ("pack_halves", "pack_bytes", "pack_nibbles"):
        getattr(library, name).argtypes = (POINTER, POINTER, LONG, LONG)
    library.pack_rounded.argtypes = (POINTER, POINTER, POINTER, *(LONG,) * 5)
    library.decoder_step.argtypes = (ctypes.POINTER(CDecoder), ctypes.POINTER(CStep))
    return library


def _pack(weight_NK: Tensor, form: Form, to: int) -> Tensor | None:
    """Write whole tiles of a weight to an address; their scales, where the form has any."""
    library, (n, k) = _library(), weight_NK.shape
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


def _round(weight_NK: Tensor, to: int, k: int) -> Tensor:
    """Write rows in bf16 as whole tiles of bytes to an address, filled up to `k` columns, without anything between; their
    scales."""
    rows, given = weight_NK.shape
    scale = torch.empty(rows + -rows % LANE)
    if _library().pack_rounded(
        weight_NK.data_ptr(), to, scale.data_ptr(), rows, given, weight_NK.stride(0), len(scale), k
    ):
        raise MemoryError("no memory for the rows that are packed")
    return scale


@cache
def why_no_decoder() -> str | None:
    """Why no decoder can be packed here, as a sentence; None where it can."""
    try:
        _library()
    except NoLibrary as why:
        return str(why)
    return None


def kernels() -> str:
    """By which instructions of this processor the decoder multiplies. Raises NoLibrary."""
    library = _library()
    library.decoder_kernels.restype = ctypes.c_char_p
    return str(library.decoder_kernels().decode())


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
                    scales.append(_round(some_NK, at, k))
                else:
                    scale = _pack(filled(some_NK, form), form, at)
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
        _library().pack_halves(weight_NK.data_ptr(), packed.data_ptr(), *weight_NK.shape)
        self._held.append(packed)
        return packed.data_ptr()


def block_bytes(decoder: Decoder, kept: Kept) -> tuple[int, int]:
    """Bytes that the keys and the values of a block take in one layer. In bytes, the scales of both lie behind the keys."""
    numbers = TOKENS * decoder.kv * decoder.size * BITS[kept] // 8
    return numbers + (2 * TOKENS * decoder.kv * 4 if kept == "int8" else 0), numbers


class Cached:
    """Keys and values of `blocks` blocks of tokens, for a packed decoder and in the form that it keeps them in, and the steps
    over them."""

    def __init__(self, packed: Packed, blocks: int):
        self.packed, self.blocks, self.kept = packed, blocks, packed.kept
        self._keys, self._values = block_bytes(packed.decoder, self.kept)
        self._layer = blocks * (self._keys + self._values)
        self._pages = Pages(self._layer * len(packed.decoder.blocks))

    def read(
        self,
        ids: Sequence[int],
        tables: Sequence[Sequence[int]],
        before: Sequence[int],
        lengths: Sequence[int],
        rows: Sequence[int],
        *,
        likeliest: bool = False,
        adapters: Sequence[int] | None = None,
        states: bool = False,
    ) -> Tensor:
        """Read `lengths` new tokens of each text, end to end in `ids`, of which `before` lie in the blocks of its table, with
        the adapter of that number for each text, or without one (-1).
        The logits after those at `rows` [R, V] in fp32, or with `likeliest` the likeliest token after each [R], -1
        where the largest logit is not finite, or with `states` the last hidden states there [R, E].

        Raises IndexError for what is not there: tokens, places or blocks."""
        packed = self.packed
        chosen = adapters if adapters and packed.adapters else [-1] * len(lengths)
        tokens = lay(ids, tables, before, lengths, rows, chosen, TOKENS)
        self._check(tokens)
        logits_RV = None if likeliest or states else torch.empty(len(rows), packed.c.head.n)
        states_RE = torch.empty(len(rows), packed.decoder.width) if states else None
        best_R = torch.zeros(len(rows), dtype=torch.int32) if likeliest else None
        # An adapter more in the middle would make the room for what they give too small.
        with packed.lock:
            if max(chosen) >= len(packed.adapters):
                raise IndexError(f"adapter {max(chosen)}, and there are {len(packed.adapters)}")
            step = CStep(
                len(ids), len(rows), torch.get_num_threads(),
                max((one.width for one in packed.adapters if one is not None), default=0),
                address(tokens.ids), address(tokens.places), address(tokens.first), address(tokens.tables), address(tokens.rows),
                None if logits_RV is None else logits_RV.data_ptr(), None if best_R is None else best_R.data_ptr(),
                address(tokens.adapters) if packed.adapters else None, None if states_RE is None else states_RE.data_ptr(),
            )  # fmt: skip
            packed.reach(tokens.longest)
            told = self._pages.at, self.blocks, self.kept
            if packed.told != told:
                packed.told, packed.c.kept = told, BITS[self.kept]
                for at, layer in enumerate(packed._layers):
                    layer.keys = self._pages.at + at * self._layer
                    layer.values = layer.keys + self.blocks * self._keys
            if _library().decoder_step(ctypes.byref(packed.c), ctypes.byref(step)):
                raise MemoryError(f"no memory for a step of {len(ids)} tokens")
        if states_RE is not None:
            return states_RE
        if best_R is not None:
            return best_R
        assert logits_RV is not None
        return logits_RV[:, : packed.vocabulary]

    def _check(self, tokens: Tokens) -> None:
        """The C code looks no number up."""
        decoder = self.packed.decoder
        known, low, high = decoder.embedding_VE.shape[0], min(tokens.ids), max(tokens.ids)
        if low < 0 or high >= known:
            raise IndexError(f"tokens from {low} to {high}, and the model has {known}")
        if decoder.places_PE is not None and tokens.longest > len(decoder.places_PE):
            raise IndexError(f"a text of {tokens.longest} places, and the model has {len(decoder.places_PE)}")
        if not tokens.held or min(tokens.tables) < 0 or max(tokens.tables) >= self.blocks:
            raise IndexError(f"blocks that are not there: {self.blocks} of {TOKENS} tokens are")

    def put_adapter(self, lows: Sequence[Lows]) -> int:
        """One adapter more that texts can be read with, by what it adds to the products of each layer; its number."""
        return self.packed.put_adapter(lows)

    def drop_adapter(self, number: int) -> None:
        """Take one out."""
        self.packed.drop_adapter(number)

    def drop(self, block: int) -> None:
        """Nothing is to be done: what is read next lies over it."""

    def copy(self, source: int, target: int) -> None:
        """The keys and values of one block to another."""
        for at in range(len(self.packed.decoder.blocks)):
            keys = self._pages.at + at * self._layer
            for start, size in ((keys, self._keys), (keys + self.blocks * self._keys, self._values)):
                ctypes.memmove(start + target * size, start + source * size, size)


class Pages:
    """Memory in large pages, given back when nobody holds it."""

    def __init__(self, size: int):
        self.bytes = -(-size // 2**21) * 2**21
        self.at = _library().take_pages(self.bytes)
        if not self.at:
            raise MemoryError(f"no memory for {self.bytes:,} bytes")
        weakref.finalize(self, _library().give_pages, self.at, self.bytes)
