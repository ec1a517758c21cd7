"""Learn from rewards: the model writes several answers to each prompt, and the better ones become likelier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import mul
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, PrivateAttr, SerializeAsAny
from torch import Tensor

from luthier.core.catalog import Part
from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Chat, Encoded, Example, Pair
from luthier.data.batches import Batch, collate
from luthier.engine.rollouts import numbers_for, roll_out
from luthier.models.cross_entropy import token_loss, token_nll
from luthier.models.output import at_temperature
from luthier.models.spec import LoadedModel, ModelSpec
from luthier.training.objectives.causal import supervised
from luthier.training.objectives.gains import clipped, pull
from luthier.training.objectives.groups import Group, Prompt, form_group, hold, read_prompt, remember
from luthier.training.objectives.part import Loss, Objective, Tally, Total, alone, encode_rows
from luthier.training.reference import Reference
from luthier.training.rewards.parse import as_list, distinct, parse_reward
from luthier.training.rewards.part import Answer, Reward


class GRPO(Objective):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300).

    To each prompt the model, as it is at that step, writes `samples` answers; the advantage A of an answer is its
    reward minus the mean of its group, over the group's standard deviation. With u = 1 / (length of the answer) and
    N answers in the step the loss is 1/N sum_answers sum_tokens u (-A ratio + beta KL), where ratio is the likelihood of
    the token over what it was when it was written, and KL = r - log r - 1 with r = likelihood at the start of training
    over likelihood now. An answer that is learned from once, at the weights that wrote it, has the ratio 1, of which
    only the gradient counts. With `updates` above 1 so many steps learn from the same answers, at weights that move on,
    and -A ratio becomes -min(A ratio, A clip(ratio, 1 - clip_low, 1 + clip_high)); the likelihoods of the time of writing
    are computed again by what learns, not taken from what wrote. `standardise: false` with `average: constant` is Dr. GRPO
    (Liu et al. 2025, arXiv:2503.20783), `average: tokens` the average of DAPO (Yu et al. 2025, arXiv:2503.14476).

    Rows are pairs, or conversations whose last answer is the gold. A group whose answers are all worth the same
    teaches nothing (but for the KL) and is counted in `no_signal`; a step of such groups alone moves nothing by itself.
    Validation is the mean reward of the likeliest (greedy) answers, and its loss is minus that.
    """

    kind: ClassVar[str] = "grpo"
    wants: ClassVar[tuple[type, ...]] = (Chat, Pair)
    metric: ClassVar[tuple[str, int]] = ("reward", +1)
    idle: ClassVar[bool] = True

    rewards: Annotated[
        tuple[Annotated[SerializeAsAny[Part], BeforeValidator(parse_reward)], ...],
        BeforeValidator(as_list),
        Field(min_length=1),
    ]
    """What an answer is worth, added up: scorers by name (exact_match ...), pattern, length, python, model; each weighted."""
    samples: int = Field(8, ge=2)
    """Answers to each prompt."""
    max_tokens: int = Field(128, gt=0)
    """Most tokens of an answer."""
    temperature: float = Field(1.0, gt=0)
    """How freely answers are drawn; the likelihoods that are learned are those at this temperature."""
    standardise: bool = True
    """Divide advantages by the standard deviation of their group."""
    average: Literal["answers", "tokens", "constant"] = "answers"
    """What counts alike in the mean: answers, tokens, or (constant) sums over an answer, divided by max_tokens."""
    beta: float = Field(0.0, ge=0)
    """Strength of the pull towards the model as it was at the start; above 0 a copy of what learns is kept."""
    updates: int = Field(1, ge=1)
    """Steps that learn from the same answers before others are written."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """How far below 1 the ratio of a token in a bad answer may fall before it is left alone; acts with `updates` above 1."""
    clip_high: float = Field(0.2, ge=0)
    """How far above 1 the ratio of a token in a good answer may rise before it is left alone (DAPO: 0.28)."""
    _reference: Reference | None = PrivateAttr(None)

    def check_model(self, spec: ModelSpec) -> None:
        if spec.task != "causal":
            raise ConfigError(
                f"objective 'grpo' needs a decoder-only model that writes text; {spec.source} ({spec.kind}, {spec.task}) "
                "does not: use another model"
            )

    def ready(self, model: LoadedModel, device: torch.device, events: Events) -> None:
        if model.renderer.turn_end is None:
            name = "raw" if model.renderer.template is None else model.renderer.template.name
            raise ConfigError(
                f"objective 'grpo': no special token ends an answer in the chat template {name!r}, so an answer would end "
                "only where max_tokens cuts it; set template: plain, which ends it with the end-of-text token, or use "
                "another template or model"
            )
        for reward in self._parts:
            reward.ready(device)

    def keep_start(self, model: LoadedModel, events: Events) -> None:
        if self.beta:
            self._reference = Reference(model)
            size = f"{self._reference.size / 2**20:.1f}"
            events.choose("reference", "a copy of what learns", f"{size} MiB, since beta is above 0")

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        self.check_examples(examples)
        rows = encode_rows(examples, lambda one: read_prompt(one, model), events, renderer=model.renderer)
        short = sum(len(row.ids) + self.max_tokens > model.spec.max_length for row in rows)
        if short:
            events.warn("prompts so long that the context has no room for max_tokens after them", short)
        return rows

    def draw(
        self, rows: Sequence[Encoded], model: LoadedModel, seed: tuple[int, ...], total: Total = alone
    ) -> Sequence[Encoded]:
        if not rows:
            if self._reference is not None:
                total(0.0)
                with self._reference.active():
                    pass  # what is shared out is gathered by all processes, also by one without rows
            return rows
        prompts = [row for row in rows for _ in range(self.samples)]
        numbers_SM = np.stack(
            [numbers_for(seed, row.id, at, self.max_tokens) for row in rows for at in range(self.samples)]
        )
        ids = [row.ids for row in prompts]
        answers = roll_out(model, ids, self.max_tokens, numbers_SM=numbers_SM, temperature=self.temperature)
        judged = self._judge(model, prompts, answers)
        groups = []
        for at, row in enumerate(rows):
            mine = slice(at * self.samples, (at + 1) * self.samples)
            each = {name: values[mine] for name, values in judged.items()}
            groups.append(form_group(self, row, answers[mine], each))
        if self.beta:
            total(0.0)  # rewards may take longer in one process than others wait for it on a device
        if self.updates > 1:
            return remember(self, groups, model, self._reference)
        return hold(self, groups, model, self._reference) if self.beta else groups

    def stand_in(self, rows: Sequence[Encoded], model: LoadedModel) -> Sequence[Encoded]:
        """Groups whose answers are all as long as they may be."""
        groups = []
        for row in rows:
            length = max(1, min(self.max_tokens, model.spec.max_length - len(row.ids)))
            answers = [(0,) * length] * self.samples
            group = form_group(self, row, answers, {"reward": [float(at) for at in range(self.samples)]})
            groups.append(replace(group, told=((0.0, 0.0, 0.0),) * len(group.ids)))
        return groups

    def prompts(self, rows: Sequence[Encoded]) -> tuple[Sequence[int], int]:
        return [len(row.ids) for row in rows for _ in range(self.samples)], self.max_tokens

    def repeats(self) -> int:
        return self.updates

    def batch(self, rows: Sequence[Encoded], model: LoadedModel, seed: tuple[int, ...]) -> Batch:
        groups = [row for row in rows if isinstance(row, Group)]
        assert len(groups) == len(rows)  # draw() comes first
        batch = collate(groups)
        batch.weight = sum(row.count for row in groups)
        if self.updates > 1:
            batch.gold = torch.tensor([told for row in groups for told in row.told])
        else:
            batch.gold = torch.tensor([row.value for row in groups])
        return batch

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        states_ME, target_M, weight_M = supervised(model, batch)
        head = at_temperature(model, self.temperature)
        assert batch.gold is not None
        if self.updates > 1:
            return self._measure_again(head, states_ME, target_M, weight_M, batch)
        surrogate = token_loss(head, states_ME, target_M, weight_M)
        # The sum of -weight x log p has the gradient of the loss where the ratio is 1, and another value.
        return Loss(surrogate - surrogate.detach() + batch.gold.sum(), batch.weight), None

    def _measure_again(
        self, head: Any, states_ME: Tensor, target_M: Tensor, share_M: Tensor, batch: Batch
    ) -> tuple[Loss, Tensor]:
        """The loss at weights that are no longer those that wrote, and which tokens are clipped [M]."""
        assert batch.gold is not None
        advantage_M, written_M, start_M = batch.gold[batch.places_M].unbind(1)
        with torch.no_grad():
            now_M = -token_nll(head, states_ME.detach(), target_M)
            found = clipped(now_M, written_M, advantage_M, self.clip_low, self.clip_high)
            loss_M, gain_M = found.loss_M, found.gain_M
            if self.beta:
                change_M, kl_M = pull(now_M, start_M)
                loss_M, gain_M = loss_M + self.beta * kl_M, gain_M + self.beta * change_M
        surrogate = token_loss(head, states_ME, target_M, share_M * gain_M)
        return Loss(surrogate - surrogate.detach() + (share_M * loss_M).sum(), batch.weight), found.clipped_M

    def observe(self, scores: Tensor) -> Tally:
        return {"clipped": (float(scores.sum()), scores.numel())} if scores.numel() else {}

    def tally(self, rows: Sequence[Encoded]) -> Tally:
        tallies = [row.tally for row in rows if isinstance(row, Group)]
        names = dict.fromkeys(name for one in tallies for name in one)
        return {name: (sum(one[name] for one in tallies), len(tallies)) for name in names}

    def examine(self, model: LoadedModel, rows: Sequence[Encoded], *, tokens: int) -> dict[str, float]:
        answers = roll_out(model, [row.ids for row in rows], self.max_tokens)
        found = {name: fmean(values) for name, values in self._judge(model, rows, answers).items()}
        return {"loss": -found["reward"], **found}

    @property
    def _parts(self) -> list[Reward]:
        return [reward for reward in self.rewards if isinstance(reward, Reward)]

    def _judge(
        self, model: LoadedModel, prompts: Sequence[Encoded], answers: Sequence[Sequence[int]]
    ) -> dict[str, list[float]]:
        """For each answer its reward, each part of it where there are several, its length, and whether it ended."""
        shown = []
        for row, ids in zip(prompts, answers):
            assert isinstance(row, Prompt)
            finished = ids[-1] in model.spec.stop_ids
            text = model.renderer.decode(ids[:-1] if finished else ids).strip()
            shown.append(Answer(row.shown, text, row.gold_answer, len(ids), finished, row.meta))
        names = distinct([reward.name for reward in self._parts])
        parts = {name: reward.score(shown) for name, reward in zip(names, self._parts)}
        weights = [reward.weight for reward in self._parts]
        found = {"reward": [sum(map(mul, weights, values)) for values in zip(*parts.values())]}
        if len(parts) > 1:
            found |= {f"reward_{name}": values for name, values in parts.items()}
        found["answer_tokens"] = [float(one.tokens) for one in shown]
        found["stopped"] = [float(one.finished) for one in shown]
        return found
