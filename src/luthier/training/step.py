"""One optimiser step: the rows in micro-batches, their gradients added up, and one move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import Parameter

from luthier.core.errors import TrainingError
from luthier.core.types import Encoded
from luthier.data.batches import deal, split_step
from luthier.training.learner import Learner
from luthier.training.noise import noisy_inputs
from luthier.training.objectives.part import Objective

# Beyond this many times its start (and at least this much), a loss is not coming back.
DIVERGED = 1000.0


def take_step(learner: Learner, rows: Sequence[Encoded]) -> tuple[float, float]:
    """Learn from `rows`, of which each process takes its share: (mean loss, gradient norm), the same in all of them.

    The loss is summed over micro-batches and divided once by the weight of the whole step, so how the rows are split
    changes nothing. Raises TrainingError on a non-finite or runaway loss, before the weights move.
    """
    settings, progress, model = learner.settings, learner.progress, learner.model
    seed = (settings.seed, progress.step)
    world, given = learner.world, rows
    rows = [rows[at] for at in deal([len(row.ids) + len(row.target) for row in rows], world.size)[world.rank]]
    with learner.whole() if learner.objective.draws else nullcontext():
        rows = learner.objective.draw(rows, model, seed, world.sum)
    learner.tally = _tally(learner, rows)
    lengths = [len(row.ids) + len(row.target) for row in rows]
    micro = [
        learner.objective.batch([rows[at] for at in part], model, seed)
        for part in split_step(
            range(len(rows)), lengths, math.ceil(settings.accumulate / world.size), settings.micro_tokens
        )
    ]
    weight, tokens = world.sum(sum(batch.weight for batch in micro), sum(batch.tokens for batch in micro))
    counted = len(micro)
    if learner.sharded is not None:
        # Gathering a layer takes all processes, so each makes as many passes as the one with the most.
        idle = _any_row(learner, rows) if learner.objective.draws else given[:1]
        micro += [learner.objective.batch(idle, model, seed) for _ in range(world.most(counted) - counted)]
    factor = learner.schedule.factor(progress.step, settings.steps)
    for group in learner.engine.param_groups:
        group["lr"] = group["base_lr"] * factor
    total = 0.0
    for at, batch in enumerate(micro):
        with noisy_inputs(model, batch.to(model.device), settings.noise, seed):
            loss, _ = learner.measure(batch)
            share = loss.sum if at < counted else loss.sum * 0
            # Sharded gradients come back as means over the processes; the others are added up below.
            (share * (1 if learner.sharded is None else world.size) / weight).backward()
        value = float(share.detach())
        total += value
        if not math.isfinite(value):
            raise _diverged(f"is {value}", progress.step, batch.names, learner.rate)
    mean = world.sum(total)[0] / weight
    if learner.sharded is None:
        world.add_gradients([parameter for _, parameter in learner.parameters])
    norm = _clip([parameter for _, parameter in learner.parameters], settings.clip)
    names = [name for batch in micro[:counted] for name in batch.names]
    if not math.isfinite(norm):
        raise _diverged(f"is {mean:.4g} but its gradient is {norm}", progress.step, names, learner.rate)
    if progress.first_loss is None:
        progress.first_loss = mean
    if mean > DIVERGED * max(progress.first_loss, 1.0):
        raise _diverged(f"went from {progress.first_loss:.4g} to {mean:.4g}", progress.step, names, learner.rate)
    learner.engine.step()
    if learner.ema is not None:
        learner.ema.update()
    learner.engine.zero_grad(set_to_none=True)
    progress.tokens += int(tokens)
    return mean, norm


def _any_row(learner: Learner, rows: Sequence[Encoded]) -> Sequence[Encoded]:
    """One row as it was drawn, of any process."""
    return [next(row for row in learner.world.gather(rows[0] if rows else None) if row is not None)]


def _tally(learner: Learner, rows: Sequence[Encoded]) -> dict[str, float]:
    """The means of what the objective counts in the rows of all processes."""
    if type(learner.objective).tally is Objective.tally:
        return {}
    parts = learner.world.gather(learner.objective.tally(rows))
    found: dict[str, list[tuple[float, float]]] = {}
    for part in parts:
        for name, pair in part.items():
            found.setdefault(name, []).append(pair)
    return {name: sum(one for one, _ in pairs) / sum(count for _, count in pairs) for name, pairs in found.items()}


def _clip(parameters: Sequence[Parameter], limit: float) -> float:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise TrainingError(
            "no trainable weight received a gradient; the adapter and the objective do not touch each other"
        )
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # of the shards of all processes
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def _diverged(what: str, step: int, names: Sequence[str], rate: float) -> TrainingError:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return TrainingError(
        f"step {step + 1}: the loss {what}, so training stopped before it spoiled the weights; the rows of this batch: {shown}. "
        f"Lower the learning rate (it is {rate:g}; a tenth is a good next try) or look at these rows"
    )
