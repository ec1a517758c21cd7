"""Learn from answers that are good or bad, one at a time: KTO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from luthier.core.events import Events
from luthier.core.types import Encoded, Example, Feedback
from luthier.data.batches import Batch
from luthier.data.split import content_key
from luthier.engine.answers import answer_logs, score_answers
from luthier.engine.passes import each_part
from luthier.models.spec import LoadedModel, ModelSpec
from luthier.training.objectives.answers import batch_answers, check_writes, encode_row, refer_to_start
from luthier.training.objectives.part import Loss, Objective, Total, alone, encode_rows


class KTO(Objective):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): raise log p of good answers, lower that of
    bad ones, both measured against the model at the start of the run and against z, how far the model has moved at all.

    With r = log p - log p at the start, the loss of a row is desirable x (1 - sigmoid(beta (r - z))) for a good answer
    and undesirable x (1 - sigmoid(beta (z - r))) for a bad one. z = max(0, mean of r' over the rows of the whole step),
    where r' is that of an answer to another prompt in place of the row's own; no gradient flows through it. It is
    computed before a step is split, over all processes, so micro-batches and processes change nothing. Deviation from
    TRL, which takes the mean over one device's micro-batch, and the next row's answer: here a row's other answer is drawn
    once, the same in every run, so that its log p at the start is computed only once; it is cut where it does not fit the
    context.
    """

    kind: ClassVar[str] = "kto"
    refers: ClassVar[bool] = True
    wants: ClassVar[tuple[type, ...]] = (Feedback,)

    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to its start."""
    desirable: float = Field(1.0, ge=0)
    """Weight of good answers; where they are fewer, the paper raises it until both kinds weigh about the same."""
    undesirable: float = Field(1.0, ge=0)
    """Weight of bad answers."""

    def check_model(self, spec: ModelSpec) -> None:
        check_writes(self.kind, spec)

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        self.check_examples(examples)
        rows = encode_rows(
            examples,
            lambda one: replace(encode_row(model, one), gold=(float(one.good),)),
            events,
            renderer=model.renderer,
        )
        others = draw_others([content_key(example) for example in examples])
        alone = sum(other is None for other in others)
        if alone:
            events.warn(
                "rows have no row with another prompt beside them, so they do not tell how far the model moved", alone
            )
        return [
            row if other is None else with_other(row, rows[other], model.spec.max_length)
            for row, other in zip(rows, others)
        ]

    def refer(self, rows: Sequence[Encoded], model: LoadedModel, events: Events, keep: Path) -> list[Encoded]:
        """gold becomes (good, log p of the answer, log p of the other one, or nothing where there is none)."""
        found: dict[int, tuple[float, ...]] = {}
        for answers in (1, 2):
            places = [at for at, row in enumerate(rows) if len(row.segments) == answers + 1]
            logs_NA = refer_to_start([rows[at] for at in places], model, events, keep)
            found |= {at: tuple(map(float, logs)) for at, logs in zip(places, logs_NA)}
        return [replace(row, gold=(*row.gold, *found[at])) for at, row in enumerate(rows)]  # type: ignore[misc]

    def draw(
        self, rows: Sequence[Encoded], model: LoadedModel, seed: tuple[int, ...], total: Total = alone
    ) -> Sequence[Encoded]:
        """The rows with their own answer only, z added to its log p at the start: the loss asks for r - z alone."""
        others = [_other_alone(row) for row in rows if len(row.segments) == 3]
        gained = 0.0
        if others:
            now_N = score_answers(model, others)[:, 0, 0]
            start_N = np.array([row.gold[-1] for row in rows if len(row.segments) == 3])  # type: ignore[index]
            gained = float((now_N - start_N).sum())
        gained, count = total(gained, len(others))
        moved = max(0.0, gained / count) if count else 0.0
        return [_own_alone(row, moved) for row in rows]

    def stand_in(self, rows: Sequence[Encoded], model: LoadedModel) -> Sequence[Encoded]:
        return [_own_alone(replace(row, gold=(1.0, 0.0)), 0.0) for row in rows]

    def batch(self, rows: Sequence[Encoded], model: LoadedModel, seed: tuple[int, ...]) -> Batch:
        return batch_answers(rows)

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        """The loss of rows as they are drawn, and r - z of each."""
        logs_R1, _ = answer_logs(model, batch)
        assert batch.gold is not None and batch.row_weights_S is not None
        good_R, start_R = batch.gold.unbind(1)
        lead_R = logs_R1[:, 0] - start_R
        loss_R = self.losses(lead_R, good_R)
        return Loss((loss_R * batch.row_weights_S).sum(), batch.weight), lead_R.detach()[:, None]

    def losses(self, lead_R: Tensor, good_R: Tensor) -> Tensor:
        """[R] from r - z, and 1 for a good answer or 0 for a bad one."""
        good = self.desirable * (1 - torch.sigmoid(self.beta * lead_R))
        bad = self.undesirable * (1 - torch.sigmoid(-self.beta * lead_R))
        return torch.where(good_R > 0, good, bad)

    def examine(self, model: LoadedModel, rows: Sequence[Encoded], *, tokens: int) -> dict[str, float]:
        """Loss and metrics of held-out rows, with z over all of them."""
        drawn = self.draw(rows, model, (0, 0))
        total = weight = 0.0
        leads: list[Tensor] = []
        good: list[Tensor] = []

        def run(part: list[int]) -> None:
            nonlocal total, weight
            batch = self.batch([drawn[at] for at in part], model, (0, 0)).to(model.device)
            loss, lead_R1 = self.measure(model, batch)
            assert lead_R1 is not None and batch.gold is not None
            total, weight = total + float(loss.sum), weight + loss.weight
            leads.append(lead_R1[:, 0].double().cpu())
            good.append(batch.gold[:, 0].cpu() > 0)

        each_part([len(row.ids) for row in drawn], tokens, run, model.device)
        return {"loss": total / weight, **self._compare(torch.cat(leads), torch.cat(good))}

    def _compare(self, lead_N: Tensor, good_N: Tensor) -> dict[str, float]:
        """How often a good answer leads a bad one (a tie counts half), and by how much on average."""
        good_G, bad_B = self.beta * lead_N[good_N], self.beta * lead_N[~good_N]
        if not len(good_G) or not len(bad_B):
            return {}
        over_GB = torch.sign(good_G[:, None] - bad_B) / 2 + 0.5
        return {"roc_auc": float(over_GB.mean()), "reward_margin": float(good_G.mean() - bad_B.mean())}


def draw_others(keys: Sequence[str]) -> list[int | None]:
    """For each row another with another key, drawn once for all: the next such in a shuffled circle; None where all keys
    are the same."""
    order = np.random.default_rng(0).permutation(len(keys)).tolist()
    found: list[int | None] = [None] * len(keys)
    for place, row in enumerate(order):
        circle = (order[(place + step) % len(order)] for step in range(1, len(order)))
        found[row] = next((other for other in circle if keys[other] != keys[row]), None)
    return found


def with_other(row: Encoded, other: Encoded, limit: int) -> Encoded:
    """`row` with the answer of `other` as a second one, cut so that it fits in `limit` tokens with the prompt."""
    prompt = row.segments[0]
    part = slice(other.segments[0], other.segments[0] + limit - prompt)
    ids, weights = other.ids[part], other.weights[part]
    return replace(
        row,
        ids=row.ids + ids,
        weights=row.weights + weights,
        segments=(*row.segments, len(ids)),
        parents=(*row.parents, 0),
    )


def _own_alone(row: Encoded, moved: float) -> Encoded:
    good, start = row.gold[:2]  # type: ignore[index]
    end = sum(row.segments[:2])
    return replace(
        row,
        ids=row.ids[:end],
        weights=row.weights[:end],
        segments=row.segments[:2],
        parents=row.parents[:2],
        gold=(good, start + moved),
    )


def _other_alone(row: Encoded) -> Encoded:
    prompt, own, other = row.segments
    return replace(
        row,
        ids=row.ids[:prompt] + row.ids[prompt + own :],
        weights=row.weights[:prompt] + row.weights[prompt + own :],
        segments=(prompt, other),
        parents=row.parents[:2],
    )
