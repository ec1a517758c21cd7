"""An engine for texts that are read once: scores of a head, or a vector; those that wait share each pass through the model."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.core.config import Config
from luthier.core.errors import ConfigError, DataError, ModelError
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.batches import Batch, collate
from luthier.engine.adapters import NONE
from luthier.engine.line import Line
from luthier.engine.native import own_adapter
from luthier.engine.paged import Paged
from luthier.engine.passes import TOKENS, each_part
from luthier.engine.reader import Reader
from luthier.engine.tenants import Tenants
from luthier.models.embedding import manner_of
from luthier.models.heads import pool_flat, width_of
from luthier.models.packed import hidden_states, packs
from luthier.models.pages import BLOCK
from luthier.models.spec import LoadedModel, Pooling
from luthier.native.cached import Cached


class Embedding(Config):
    """One vector of a text, from the last hidden states of its tokens."""

    pooling: Literal["auto", "mean", "first", "last"] = "auto"
    """The mean over the tokens, the first or the last one; auto: as the model's files say, else the mean of an encoder and the
    last token of a decoder."""
    normalise: bool | None = None
    """Whether it is scaled to length 1; None: as the model's files say, else not."""
    dimensions: int | None = Field(None, gt=0)
    """Keep so many first numbers of it, for models that are made for that (Kusupati et al. 2022, arXiv:2205.13147)."""


@dataclass(eq=False, slots=True)
class Reading:
    """A text that is read once. `found` is what came of it: raw scores [C] of a head, or a vector [E]; fp32, on the CPU."""

    prompt: tuple[int, ...]
    number: int
    embedding: Embedding | None
    """None: scores."""
    priority: int = 0
    tenant: str = ""
    adapter: int = NONE
    """The number of the adapter beside the model that it is read with."""
    charged: int = 0
    finish: Literal["stop", "abort", "error"] | None = None
    error: Exception | None = None
    found: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens to be read."""
        return len(self.prompt)


class Pooler:
    """Reads texts with any model, any number of them at a time: a classifier's, regressor's or reward model's scores, and vectors
    of any model.

    A step is one pass over the first in line (`engine.line`), with `tokens` tokens in all, or one text that is longer. They are
    packed where the family allows it (`models.packed`). What comes of a text does not depend on those beside it but for
    rounding. One that goes wrong ends alone. Where memory runs out, half as much is read at once from then on, which is said.
    `reader` has the adapters beside the model, where there are any.
    """

    def __init__(
        self, model: LoadedModel, *, tokens: int = TOKENS, tenants: Tenants | None = None, events: Events | None = None,
        reader: Reader | None = None,
    ):  # fmt: skip
        self.model, self.tokens, self._events, self._reader = model, tokens, events, reader
        self._line: Line[Reading] = Line(tenants)
        self._arrived = 0
        # Keys and values of a step, of a packed model: nothing of a text is kept after it.
        self._cached: Cached | None = None

    def pool(
        self,
        ids: Sequence[int],
        embedding: Embedding | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        adapter: int = NONE,
    ) -> Reading:
        """A text to be read, which waits until a step takes it up: for scores, or for a vector where it says which; with the
        adapter of that number in `reader`.

        Raises DataError for a text that cannot be read, ConfigError for settings that this model cannot follow, and ModelError
        where there are no scores.
        """
        spec = self.model.spec
        if embedding is None and spec.task not in ("classify", "regress"):
            raise ModelError(f"{spec.source}: this model is made to {spec.task}, not to classify or to give numbers")
        if embedding is not None:
            check_embedding(self.model, embedding, self._events)
        if not ids:
            raise DataError("a text needs one token at least")
        if len(ids) > spec.max_length:
            raise DataError(f"the text has {len(ids)} tokens, and the context is {spec.max_length}; shorten it")
        vocabulary = self.model.vocabulary
        strange = [token for token in ids if not 0 <= token < vocabulary]
        if strange:
            raise DataError(f"there is no token {strange[0]}; the vocabulary has {vocabulary}, from 0 on")
        reading = Reading(tuple(ids), self._arrived, embedding, priority, tenant, adapter)
        self._arrived += 1
        self._line.add(reading)
        return reading

    def abort(self, reading: Reading) -> None:
        """Read it no more; nothing happens to one that has ended."""
        if reading.finish is None:
            reading.finish = "abort"
            self._line.finish(reading)

    def fail(self, reading: Reading, error: Exception) -> None:
        """End a text that waits with an error."""
        reading.error, reading.finish = error, "error"
        self._line.finish(reading)

    @property
    def busy(self) -> bool:
        """Whether any text is not finished."""
        return bool(self._line.waiting)

    @property
    def waiting(self) -> list[Reading]:
        """Texts that were not taken up yet."""
        return self._line.waiting

    def step(self) -> list[Reading]:
        """The texts that were read, or ended with an error. A text that goes wrong beside others is read again alone."""
        planned = self._plan()
        try:
            self._read(planned)
        except Exception as err:
            traceback.clear_frames(err.__traceback__)
            for one in planned:
                if one.finish is None:
                    self._read_alone(one)
        return planned

    def run(self, on_progress: Callable[[list[Reading]], None] | None = None) -> None:
        """Step until every text is read. Raises the error of one that ended with it."""
        while self.busy:
            found = self.step()
            for one in found:
                if one.error is not None:
                    raise one.error
            if on_progress is not None:
                on_progress(found)

    def _plan(self) -> list[Reading]:
        planned: list[Reading] = []
        budget = self.tokens
        for one in self._line.in_turn():
            if planned and one.length > budget:
                break
            planned.append(one)
            self._line.charge(one)
            budget -= one.length
        return planned

    def _read_alone(self, reading: Reading) -> None:
        try:
            self._read([reading])
        except Exception as err:
            traceback.clear_frames(err.__traceback__)
            self.fail(reading, err)

    def _read(self, planned: Sequence[Reading]) -> None:
        """One pass over all, or several over parts of them where memory runs out."""

        def run(part: list[int]) -> None:
            self._put_through([planned[at] for at in part])

        module = None if self.model.packed_only else self.model.module
        training = module is not None and module.training
        if module is not None:
            module.eval()
        try:
            with torch.no_grad():
                left = each_part([one.length for one in planned], self.tokens, run, self.model.device, self._events)
        finally:
            if module is not None:
                module.train(training)
        self.tokens = left

    def _put_through(self, readings: Sequence[Reading]) -> None:
        for scored, beside in ((True, False), (False, False), (False, True)):
            chosen = [one for one in readings if ((one.embedding is None), one.adapter != NONE) == (scored, beside)]
            if not chosen:
                continue
            batch = collate([Encoded(str(one.number), one.prompt) for one in chosen]).to(self.model.device)
            found = score_batch(self.model, batch) if scored else self._vectors(chosen, batch)
            for one, found_C in zip(chosen, found):
                one.found, one.finish = found_C.float().cpu(), "stop"
                self._line.finish(one)

    def _hidden_states(self, batch: Batch, adapters: Sequence[int]) -> Tensor:
        """[N, E] in fp32: by the native decoder where only its weights are there, or the adapters beside them."""
        if isinstance(self._reader, Paged) and adapters[0] != NONE:
            return self._states_beside(self._reader, batch, adapters).float()
        if adapters[0] == NONE and not self.model.packed_only:
            return hidden_states(self.model, batch.ids_N, batch.lengths).float()
        packed = self.model.native
        assert packed is not None
        widths = [-(-length // BLOCK) for length in batch.lengths]
        starts = [0, *accumulate(widths)]
        if self._cached is None or self._cached.blocks < starts[-1]:
            self._cached = None
            self._cached = Cached(packed, starts[-1])
        tables = [list(range(start, start + width)) for start, width in zip(starts, widths)]
        if adapters[0] == NONE and own_adapter(self.model):
            adapters = [0] * len(widths)
        ids = batch.ids_N.tolist()
        return self._cached.read(
            ids, tables, [0] * len(widths), batch.lengths, range(len(ids)), adapters=adapters, states=True
        )

    def _states_beside(self, reader: Paged, batch: Batch, adapters: Sequence[int]) -> Tensor:
        """[N, E] of texts that have adapters, each its own."""
        if packs(self.model):
            with reader.adding(adapters, batch.lengths):
                return hidden_states(self.model, batch.ids_N, batch.lengths)
        # Where texts are padded side by side, rows are not theirs alone.
        found = []
        for ids_T, adapter in zip(torch.split(batch.ids_N, list(batch.lengths)), adapters):
            with reader.adding_to_all(adapter):
                found.append(hidden_states(self.model, ids_T, (len(ids_T),)))
        return torch.cat(found)

    def _vectors(self, readings: Sequence[Reading], batch: Batch) -> list[Tensor]:
        hidden_NE = self._hidden_states(batch, [one.adapter for one in readings])
        asked = [one.embedding or Embedding() for one in readings]
        ways: list[Pooling] = [
            manner_of(self.model, self._events).pooling if one.pooling == "auto" else one.pooling for one in asked
        ]
        pooled = {way: pool_flat(hidden_NE, batch.lengths, way) for way in dict.fromkeys(ways)}
        found = []
        for at, (one, way) in enumerate(zip(asked, ways)):
            vector_E = pooled[way][at, : one.dimensions]
            normalise = manner_of(self.model, self._events).normalised if one.normalise is None else one.normalise
            found.append(torch.nn.functional.normalize(vector_E, dim=0) if normalise else vector_E)
        return found


def blocks_held(context: int, texts: int, tokens: int) -> int:
    """Blocks of keys and values that a step takes at most where weights are packed, of so many texts with so many tokens in all,
    or of one that is longer."""
    return max(-(-context // BLOCK), (tokens + min(texts, tokens) * (BLOCK - 1)) // BLOCK)


def score_batch(model: LoadedModel, batch: Batch) -> Tensor:
    """Raw scores [S, C] in fp32 of a classifier's or regressor's rows."""
    hidden_NE = hidden_states(model, batch.ids_N, batch.lengths)
    return model.module.score(hidden_NE, batch.lengths)  # type: ignore[operator,no-any-return]


def check_embedding(model: LoadedModel, embedding: Embedding, events: Events | None = None) -> None:
    """Raises ConfigError for settings that this model cannot follow, and ModelError for files that ask for what is not done
    here."""
    width = width_of(model.config)
    if embedding.dimensions is not None and embedding.dimensions > width:
        raise ConfigError(f"dimensions: {embedding.dimensions} are asked for, and this model's vectors have {width}")
    if embedding.pooling == "auto" or embedding.normalise is None:
        manner_of(model, events)
