"""Keys and values in blocks, and the steps of a packed decoder over them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.native.forms import BITS
from luthier.native.library import TOKENS, CStep, Pages, decoder_library
from luthier.native.packed import Lows, Packed, block_bytes
from luthier.native.tokens import Tokens, address, lay


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
            if decoder_library().decoder_step(ctypes.byref(packed.c), ctypes.byref(step)):
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
