"""How likely given continuations of a prompt are: what prompts and continuations begin alike with is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from luthier.core.errors import DataError, ModelError
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.engine.likelihood import score
from luthier.engine.passes import TOKENS, each_part
from luthier.models.output import head_of
from luthier.models.pages import writes_by_pages
from luthier.models.spec import LoadedModel
from luthier.models.trees import Tree, Trunk, grow_trunk, read_trees, shared_length

Asked: TypeAlias = tuple[Sequence[int], Sequence[Sequence[int]]]
"""The tokens of a prompt, and those of each of its continuations."""

# States that become logits at once.
ROWS = 64


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
    continuations begin with are read once, their last tokens not at all. Raises ModelError for other models.
    """

    def __init__(self, model: LoadedModel):
        if model.spec.task != "causal":
            raise ModelError(
                f"{model.spec.source}: this model is made to {model.spec.task}; continuations are scored by a decoder-only "
                "language model"
            )
        self.model, self._trunk = model, Trunk()

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
        cannot read a prompt once. Raises DataError for an empty prompt or continuation, or what exceeds the context.
        """
        for prompt, continuations in asked:
            self._check(prompt, continuations)
        if not asked:
            return []
        if not writes_by_pages(self.model):
            return self._score_apart(asked, tokens, on_progress, events)
        prompts = [tuple(prompt) for prompt, _ in asked]
        shared = min(shared_length(prompts), min(map(len, prompts)) - 1)
        grow_trunk(self.model, self._trunk, prompts[0][:shared])
        planted = [_plant(prompt[shared:], continuations) for prompt, (_, continuations) in zip(prompts, asked)]
        found: list[list[Score]] = [[]] * len(asked)
        done = 0

        def run(part: list[int]) -> None:
            nonlocal done
            for at, scores in zip(part, self._score_trees([planted[at] for at in part])):
                found[at] = scores
            done += len(part)
            if on_progress is not None:
                on_progress(done, len(asked))

        each_part([len(one.tree.ids) for one in planted], tokens, run, self.model.device, events)
        return found

    def _check(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> None:
        if not prompt or not all(continuations):
            raise DataError("a prompt and each of its continuations need one token at least")
        size, limit = len(prompt) + max(map(len, continuations), default=0), self.model.spec.max_length
        if size > limit:
            raise DataError(
                f"the prompt and a continuation have {size} tokens, and the context is {limit}; shorten them"
            )

    @torch.no_grad()
    def _score_trees(self, planted: Sequence[_Planted]) -> list[list[Score]]:
        states_NE = read_trees(self.model, [one.tree for one in planted], self._trunk)
        places, targets, first = [], [], 0
        for one in planted:
            places += [first + at for at, _ in one.steps]
            targets += [token for _, token in one.steps]
            first += len(one.tree.ids)
        logs = iter(self._log_probs(states_NE, torch.tensor(places), torch.tensor(targets)).tolist())
        found = []
        for one in planted:
            own = [next(logs) for _ in one.steps]
            found.append([Score(sum(own[at] for at in path), len(path)) for path in one.paths])
        return found

    def _log_probs(self, states_NE: Tensor, places_M: Tensor, targets_M: Tensor) -> Tensor:
        """[M], in fp32 on the CPU: the log-probability of each target, predicted by the state at its place."""
        head, device = head_of(self.model), states_NE.device
        # Of a state that predicts several tokens the logits are made once.
        sources_R, which_M = torch.unique(places_M, return_inverse=True)
        found_M = torch.empty(len(places_M))
        for start in range(0, len(sources_R), ROWS):
            logits_RV = head.logits(states_NE[sources_R[start : start + ROWS].to(device)]).float()
            inside = ((which_M >= start) & (which_M < start + ROWS)).nonzero().squeeze(1)
            rows = (which_M[inside] - start).to(device)
            logs = logits_RV[rows, targets_M[inside].to(device)] - logits_RV.logsumexp(1)[rows]
            found_M[inside] = logs.cpu()
        return found_M

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


@dataclass(frozen=True, slots=True)
class _Planted:
    """What is left of a prompt with all its continuations. `steps` are the tokens to be predicted, each with the place of
    the state that predicts it; a path is the steps of one continuation."""

    tree: Tree
    steps: list[tuple[int, int]]
    paths: list[list[int]]


def _plant(prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> _Planted:
    ids, ups = list(prompt), list(range(-1, len(prompt) - 1))
    steps: dict[tuple[int, int], int] = {}
    grown: dict[tuple[int, int], int] = {}
    paths = []
    for one in continuations:
        at, path = len(prompt) - 1, []
        for left, token in zip(range(len(one) - 1, -1, -1), one):
            step = at, token
            path.append(steps.setdefault(step, len(steps)))
            if left and step not in grown:
                grown[step] = len(ids)
                ids.append(token)
                ups.append(at)
            at = grown.get(step, -1)
        paths.append(path)
    return _Planted(Tree(tuple(ids), tuple(ups)), list(steps), paths)
