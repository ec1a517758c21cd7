"""How likely given continuations of a prompt are: what prompts and continuations begin alike with is read once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from luthier.core.errors import DataError, ModelError
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.batches import fill_batches
from luthier.engine.adapters import NONE, Lent
from luthier.engine.lanes import Lanes
from luthier.engine.likeliest import not_numbers
from luthier.engine.likelihood import score
from luthier.engine.native import own_adapter
from luthier.engine.paged import Paged
from luthier.engine.passes import TOKENS, each_part
from luthier.engine.planted import Planted, plant
from luthier.engine.reader import Reader
from luthier.models.output import head_of
from luthier.models.pages import writes_by_pages
from luthier.models.spec import LoadedModel
from luthier.models.trees import Trunk, grow_trunk, read_trees, shared_length
from luthier.native.likely import log_shares

Asked: TypeAlias = tuple[Sequence[int], Sequence[Sequence[int]]]
"""The tokens of a prompt, and those of each of its continuations."""

# States that become logits at once, and prompts that the native decoder reads together.
ROWS, LANES = 64, 128


@dataclass(frozen=True, slots=True)
class Score:
    """Of a continuation: the sum of the log-probabilities of its tokens, in nats, and how many tokens there are."""

    log_prob: float
    tokens: int

    @property
    def per_token(self) -> float:
        """The mean log-probability of its tokens."""
        return self.log_prob / self.tokens


class Scorer:
    """Scores with a decoder-only language model; what the prompts of one call begin with is kept for the next.

    The prompts' common beginning is read once, then each prompt with its continuations as a tree: tokens that several
    continuations begin with are read once, their last tokens not at all. `lent` is an adapter beside the model, which `reader`
    has. Raises ModelError for other models, and for an adapter that was taken out.
    """

    def __init__(self, model: LoadedModel, lent: Lent | None = None, reader: Reader | None = None):
        if model.spec.task != "causal":
            raise ModelError(
                f"{model.spec.source}: this model is made to {model.spec.task}; continuations are scored by a decoder-only "
                "language model"
            )
        self.model, self._trunk = model, Trunk()
        self._lent, self._reader = lent, reader
        self._lanes: Lanes | None = None

    def score(
        self,
        asked: Sequence[Asked],
        *,
        tokens: int = TOKENS,
        on_progress: Callable[[int, int], None] | None = None,
        events: Events | None = None,
    ) -> list[list[Score]]:
        """The score of each continuation of each prompt, in order; `tokens` go through the model at once.

        Equal, but for rounding, to reading each prompt with each continuation by itself, which is done for families that
        cannot read a prompt once. Raises DataError for an empty prompt or continuation, or what exceeds the context, and
        ModelError for logits that are not numbers.
        """
        for prompt, continuations in asked:
            self._check(prompt, continuations)
        if self._lent is not None:
            self._lent.check()
        if not asked:
            return []
        native = self.model.native is not None
        if not native and not writes_by_pages(self.model):
            return self._score_apart(asked, tokens, on_progress, events)
        if events is not None and "scoring" not in events.choices:
            by = "the model's own layers" if self.model.native is None else f"native {self.model.native.form}"
            events.choose(
                "scoring", by, "prompts that begin alike are read once, and each once for all that may follow"
            )
        prompts = [tuple(prompt) for prompt, _ in asked]
        shared = min(shared_length(prompts), min(map(len, prompts)) - 1)
        planted = [plant(prompt[shared:], continuations) for prompt, (_, continuations) in zip(prompts, asked)]
        sizes = [len(one.tree.ids) for one in planted]
        if native:
            lanes = self._own_lanes()
            # As many at once as there are lanes at most.
            sizes = [max(size, -(-tokens // LANES)) for size in sizes]
            parts = [[planted[at] for at in part] for part in fill_batches(sizes, tokens)]
            lanes.grow_trunk(prompts[0][:shared], parts)
            read = lanes.score
        else:
            with self._adding():
                grow_trunk(self.model, self._trunk, prompts[0][:shared])
            read = self._score_trees
        found: list[list[Score]] = [[]] * len(asked)
        done = 0

        def run(part: list[int]) -> None:
            nonlocal done
            for at, logs in zip(part, read([planted[at] for at in part])):
                found[at] = [Score(sum(logs[step] for step in path), len(path)) for path in planted[at].paths]
                if any(math.isnan(one.log_prob) for one in found[at]):
                    # Nothing that was read beside it is kept.
                    self.let_go()
                    raise not_numbers()
            done += len(part)
            if on_progress is not None:
                on_progress(done, len(asked))

        each_part(sizes, tokens, run, self.model.device, events)
        return found

    def let_go(self) -> None:
        """Keep nothing of what was read."""
        self._trunk, self._lanes = Trunk(), None

    def _check(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> None:
        if not prompt or not all(continuations):
            raise DataError("a prompt and each of its continuations need one token at least")
        size, limit = len(prompt) + max(map(len, continuations), default=0), self.model.spec.max_length
        if size > limit:
            raise DataError(
                f"the prompt and a continuation have {size} tokens, and the context is {limit}; shorten them"
            )

    def _own_lanes(self) -> Lanes:
        """Lanes of the native decoder."""
        packed = self.model.native
        assert packed is not None
        if self._lanes is None or self._lanes.packed is not packed:
            own = 0 if own_adapter(self.model) else NONE
            self._lanes = Lanes(packed, own if self._lent is None else self._lent.slot)
        return self._lanes

    def _adding(self) -> Any:
        """What adds what the adapter adds to all that is read."""
        if self._lent is None:
            return nullcontext()
        assert isinstance(self._reader, Paged)
        return self._reader.adding_to_all(self._lent.slot)

    @torch.no_grad()
    def _score_trees(self, planted: Sequence[Planted]) -> list[list[float]]:
        """For each tree the log-probability of each of its steps, by the model's own layers."""
        with self._adding():
            states_NE = read_trees(self.model, [one.tree for one in planted], self._trunk)
        head, first = head_of(self.model), 0
        rows: list[int] = []
        columns: list[list[int]] = []
        for one in planted:
            rows += [first + place for place in one.asked]
            columns += one.asked.values()
            first += len(one.tree.ids)
        logs = []
        for start in range(0, len(rows), ROWS):
            logits_RV = head.logits(states_NE[rows[start : start + ROWS]]).float()
            logs += log_shares(logits_RV, columns[start : start + ROWS]).tolist()
        given = iter(logs)
        # Given place after place, and kept step after step.
        found = [{(place, token): next(given) for place in one.asked for token in one.asked[place]} for one in planted]
        return [[own[step] for step in one.steps] for one, own in zip(planted, found)]

    def _score_apart(
        self,
        asked: Sequence[Asked],
        tokens: int,
        on_progress: Callable[[int, int], None] | None,
        events: Events | None,
    ) -> list[list[Score]]:
        """Each prompt with each continuation by itself."""
        if events is not None:
            family = self.model.spec.family
            events.choose(
                "shared prompts", "read again", f"{family} models do not read a text once for all that continue it"
            )
        rows = [
            Encoded(str(at), (*prompt, *one), (*(0.0,) * len(prompt), *(1.0,) * len(one)))
            for at, (prompt, continuations) in enumerate(asked)
            for one in continuations
        ]
        scored = iter(score(self.model, rows, tokens=tokens, on_progress=on_progress, events=events))
        return [[Score(-next(scored)[0], len(one)) for one in continuations] for _, continuations in asked]
