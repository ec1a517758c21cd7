"""A step through any model that dispatches its attention: transformers' own modules over keys and values in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.models.pages import FEWEST, Pages, Store, next_logits, read_pages
from luthier.models.spec import LoadedModel


class Paged:
    """Reads a model's texts in steps; `blocks` is how many blocks of keys and values there are."""

    def __init__(self, model: LoadedModel, blocks: int):
        self.model, self.blocks = model, blocks
        # The last block is for what fills a step up.
        self._store = Store(blocks + 1)
        self._fewest = FEWEST.get(model.network.dtype, 1)

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
        """Read `lengths` new tokens of each text, end to end in `ids`, of which `before` lie in the blocks of its table.
        The logits after those at `rows` [R, V] in fp32, or with `likeliest` the likeliest token after each [R]."""
        short = max(0, self._fewest - len(ids))
        if short:
            ids, lengths = [*ids, *[0] * short], [*lengths, short]
            tables, before = [*tables, [self.blocks]], [*before, 0]
        device, module = self.model.device, self.model.module
        training = module.training
        module.eval()
        try:
            pages = Pages(self._store, tables, before, lengths, device)
            states_NE = read_pages(self.model, torch.tensor(ids, device=device), pages)
            if not rows:
                return states_NE[:0]
            # Like a step, the head is given no fewer rows than round like many.
            filled = [*rows, *[rows[0]] * (self._fewest - len(rows))]
            logits_RV = next_logits(self.model, states_NE[filled])[: len(rows)]
            return logits_RV.argmax(-1) if likeliest else logits_RV
        finally:
            module.train(training)

    def copy(self, source: int, target: int) -> None:
        """One block as another."""
        self._store.copy(source, target)
