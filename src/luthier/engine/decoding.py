"""Steps in which every text has one new token, over buffers that stay where they are: what a CUDA graph can be captured of.

Such a step is filled up to one of a few sizes with tokens of a scratch block, so that there are few graphs; each is captured when
its size has been asked for a few times. All that changes between steps is copied into its buffers first; logits are made outside.
A graph reads the weights where they lie, so an engine is made anew when they are put elsewhere.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from luthier.models.memory import return_freed_memory
from luthier.models.pages import TOLERANCE, Standing, Store, read_pages
from luthier.models.spec import LoadedModel
from luthier.models.varlen import Texts

# Texts that a step is filled up to, and how often one of such a size is read token by token before it is captured.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BEFORE = 4

Step: TypeAlias = Callable[[], Tensor]
"""Reads what lies in the buffers; the states of their tokens."""
Capture: TypeAlias = Callable[[Step], Step]
"""Makes a step one that is replayed: it gives the same tensor each time, with other numbers in it."""


class Graphs:
    """Captures steps of a CUDA device. They share their memory, as one runs at a time."""

    def __init__(self, device: torch.device):
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        here, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            # What is done only once must be done before.
            for _ in range(2):
                step()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile is no part of it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            states_NE = step()

        def replay() -> Tensor:
            graph.replay()
            return states_NE

        return replay


def capturer(device: torch.device) -> Capture | None:
    """What captures steps on a device; None where none can be."""
    return Graphs(device) if device.type == "cuda" else None


class Buffers:
    """A step of `size` texts with one new token each and tables of `width` blocks, in place."""

    def __init__(self, model: LoadedModel, store: Store, size: int, width: int):
        device = model.device
        self._longs = torch.zeros(3, size, dtype=torch.int64, device=device)
        self._ints = torch.zeros(size * (width + 2) + 1, dtype=torch.int32, device=device)
        tables_N, keys, seen_S = self._ints.tensor_split([size * width, size * (width + 1) + 1])
        self.size, self.width, self._block = size, width, store.size
        self.ids_N, places_N, slots_N = self._longs
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        # How long the longest is says the table, so that it is one number for all steps.
        texts = Texts(tables_N.view(size, width), starts, keys, seen_S, 1, width * store.size)
        self.pages = Standing(store, places_N, slots_N, texts)

    def fill(self, ids: Sequence[int], tables: Sequence[Sequence[int]], before: Sequence[int], scratch: int) -> None:
        """Put a step into them; rows beyond it read a token of the scratch block."""
        count, size, width = len(ids), self.size, self.width
        tables_SW = np.full((size, width), scratch, dtype=np.int32)
        places_S = np.zeros(size, dtype=np.int64)
        places_S[:count] = before
        for row, table in enumerate(tables):
            held = table[: before[row] // self._block + 1]
            tables_SW[row, : len(held)] = held
        longs = np.zeros((3, size), dtype=np.int64)
        longs[0, :count], longs[1] = ids, places_S
        blocks_S = tables_SW[np.arange(size), places_S // self._block]
        longs[2] = blocks_S.astype(np.int64) * self._block + places_S % self._block
        seen_S = places_S + 1
        ints = np.concatenate([tables_SW.ravel(), [0], seen_S.cumsum(), seen_S]).astype(np.int32)
        self._longs.copy_(torch.from_numpy(longs))
        self._ints.copy_(torch.from_numpy(ints))


class Decoding:
    """Reads steps of single tokens, captured by size. `scratch` is a block that no text has, `width` how many one has at most."""

    def __init__(self, model: LoadedModel, store: Store, scratch: int, width: int, capture: Capture):
        self._model, self._store, self._scratch, self._width, self._capture = model, store, scratch, width, capture
        self._made: dict[int, tuple[Buffers, Step]] = {}
        self._asked = Counter[int]()
        self._fails = False

    def read(self, ids: Sequence[int], tables: Sequence[Sequence[int]], before: Sequence[int]) -> Tensor | None:
        """[S, E]: the state after the new token of each text, of which `before` tokens lie in its blocks; None where such a step
        is not captured, or not yet."""
        size = next((size for size in SIZES if size >= len(ids)), None)
        if size is None or self._fails or max(before) >= self._width * self._store.size:
            return None
        made = self._made.get(size)
        if made is None:
            self._asked[size] += 1
            if self._asked[size] <= BEFORE:
                return None
            made = self._make(size, ids, tables, before)
        if made is None:
            return None
        buffers, step = made
        buffers.fill(ids, tables, before, self._scratch)
        return step()[: len(ids)]

    def _make(
        self, size: int, ids: Sequence[int], tables: Sequence[Sequence[int]], before: Sequence[int]
    ) -> tuple[Buffers, Step] | None:
        """Capture a step of that size, and see that it gives what it gave before; None, with a warning, where it does not."""
        buffers = Buffers(self._model, self._store, size, self._width)
        buffers.fill(ids, tables, before, self._scratch)

        def step() -> Tensor:
            return read_pages(self._model, buffers.ids_N, buffers.pages)

        try:
            right_NE = step()[: len(ids)].float()
            captured = self._capture(step)
            found_NE = captured()[: len(ids)].float()
            apart, most = float((found_NE - right_NE).abs().max()), float(right_NE.abs().max())
            # What is no number is no number either way.
            if apart > TOLERANCE[self._model.network.dtype] * most:
                raise RuntimeError("what is replayed gives other numbers")
        except (RuntimeError, ValueError, AssertionError) as err:
            traceback.clear_frames(err.__traceback__)
            said = str(err).splitlines()[0] if str(err) else type(err).__name__
            self._fails = True
            self._made.clear()
            return_freed_memory(self._model.device)
            warnings.warn(
                f"steps cannot be captured as CUDA graphs, so they are read call by call, slower: {said}",
                stacklevel=5,
            )
            return None
        self._made[size] = buffers, captured
        return self._made[size]
