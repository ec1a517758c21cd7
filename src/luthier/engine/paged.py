"""A step through any model that dispatches its attention: transformers' own modules over keys and values in blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from luthier.core.errors import ModelError
from luthier.engine.decoding import Decoding, capturer
from luthier.engine.likeliest import most_likely
from luthier.models.adapters.additions import Addition
from luthier.models.adapters.rows import Pair, adding, adding_to_all, pairs_of
from luthier.models.pages import FEWEST, Pages, Store, next_logits, page_size, read_pages
from luthier.models.parallel import agree
from luthier.models.spec import LoadedModel
from luthier.models.varlen import by_text


class Paged:
    """Reads a model's texts in steps; `blocks` is how many blocks of keys and values there are."""

    def __init__(self, model: LoadedModel, blocks: int):
        self.model, self.blocks = model, blocks
        # The last block is for what fills a step up.
        self._store = Store(blocks + 1, page_size(model))
        self._fewest = 1 if by_text(model.device) else FEWEST.get(model.network.dtype, 1)
        self._decoding = self._capture()
        # By their numbers in a step; None where one was taken out.
        self._adapters: list[dict[str, Pair] | None] = []

    def read(
        self,
        ids: Sequence[int],
        tables: Sequence[Sequence[int]],
        before: Sequence[int],
        lengths: Sequence[int],
        rows: Sequence[int],
        *,
        likeliest: bool = False,
        adapters: Sequence[int] = (),
    ) -> Tensor:
        """Read `lengths` new tokens of each text, end to end in `ids`, of which `before` lie in the blocks of its table,
        with the adapter of that number for each text, or without one (-1).
        The logits after those at `rows` [R, V] in fp32, or with `likeliest` the likeliest token after each [R], -1 where its
        logit is no number."""
        short = max(0, self._fewest - len(ids))  # none where steps are captured
        if short:
            ids, lengths = [*ids, *[0] * short], [*lengths, short]
            tables, before = [*tables, [self.blocks]], [*before, 0]
        device, module = self.model.device, self.model.module
        training = module.training
        if training:
            module.eval()
        try:
            # One new token of every text, all of the model itself.
            single = len(ids) == len(lengths) and [*rows] == [*range(len(ids))] and all(one < 0 for one in adapters)
            if self._decoding is not None and single:
                decoded_NE = self._decoding.read(ids, tables, before)
                if decoded_NE is not None:
                    return self._said(decoded_NE, likeliest)
            pages = Pages(self._store, tables, before, lengths, device)
            with self.adding(adapters, lengths):
                states_NE = read_pages(self.model, torch.tensor(ids, device=device), pages)
            if not rows:
                return states_NE[:0]
            # Like a step, the head is given no fewer rows than round like many.
            filled = [*rows, *[rows[0]] * (self._fewest - len(rows))]
            return self._said(states_NE[filled], likeliest)[: len(rows)]
        finally:
            if training:
                module.train()

    def _said(self, states_RE: Tensor, likeliest: bool) -> Tensor:
        """The logits after these states, or the likeliest tokens."""
        logits_RV = next_logits(self.model, states_RE)
        found = most_likely(logits_RV) if likeliest else logits_RV
        return found if self.model.parts == 1 else agree(found.contiguous())

    def _capture(self) -> Decoding | None:
        """What reads steps of single tokens on a CUDA device, where `varlen_attn` attends in all layers."""
        # What processes exchange that share the weights is not captured.
        whole = not any(hasattr(one, "full_tensor") for one in self.model.network.parameters())
        capture = capturer(self.model.device) if self.model.plainly == () and whole else None
        if capture is None:
            return None
        width = min(self.blocks, -(-self.model.spec.max_length // self._store.size))
        return Decoding(self.model, self._store, self.blocks, width, capture)

    def put_adapter(self, layers: Mapping[str, Addition]) -> int:
        """One adapter more that texts can be read with, by what it adds to each layer; its number. Raises ModelError for a
        layer that the model does not put all its tokens through, once each."""
        made, count = pairs_of(layers, self.model.device), max(1, self._fewest)
        pages = Pages(self._store, [[self.blocks]], [0], [count], self.model.device)
        ids_N, rows_N = (torch.zeros(count, dtype=torch.int64, device=self.model.device) for _ in range(2))
        try:
            with torch.inference_mode(), adding(self.model.network, [(made, rows_N[:1])], count) as asked:
                read_pages(self.model, ids_N, pages)
            other = next((name for name, times in asked.items() if times != 1), None)
            trouble = None if other is None else f"{other} is asked {asked[other]} times for a text"
        except ValueError as err:
            trouble = str(err)
        if trouble is not None:
            raise ModelError(
                f"a {self.model.spec.family} model cannot be read with adapters beside it: {trouble}; merge the adapter"
            )
        free = self._adapters.index(None) if None in self._adapters else len(self._adapters)
        self._adapters[free : free + 1] = [made]
        return free

    def drop_adapter(self, number: int) -> None:
        """Take one out; the numbers of the others stay."""
        self._adapters[number] = None

    def adding_to_all(self, adapter: int) -> Any:
        """What adds to all rows that go through the model what this adapter adds."""
        return adding_to_all(self.model.network, self._pairs(adapter))

    def adding(self, adapters: Sequence[int], lengths: Sequence[int]) -> Any:
        """What adds to the rows of each text, end to end, what its adapter adds."""
        if all(one < 0 for one in adapters):
            return nullcontext()
        rows: dict[int, list[int]] = {}
        start = 0
        for at, length in zip(adapters, lengths):
            if at >= 0:
                rows.setdefault(at, []).extend(range(start, start + length))
            start += length
        parts = []
        for at, places in rows.items():
            parts.append((self._pairs(at), torch.tensor(places, device=self.model.device)))
        return adding(self.model.network, parts, sum(lengths))

    def _pairs(self, adapter: int) -> dict[str, Pair]:
        pairs = self._adapters[adapter]
        if pairs is None:
            raise IndexError(f"adapter {adapter} was taken out")
        return pairs

    def copy(self, source: int, target: int) -> None:
        """One block as another."""
        self._store.copy(source, target)

    def drop(self, block: int) -> None:
        """Nothing is to be done: what is read next lies over it."""
