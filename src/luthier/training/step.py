"""One optimiser step: the rows in micro-batches, their gradients added up, and one move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import Parameter

from luthier.core.errors import TrainingError
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.batches import deal, split_step
from luthier.data.cache import lengths_of
from luthier.models.memory import out_of_memory, return_freed_memory
from luthier.training.draws import draw_state, restore_draws
from luthier.training.learner import Learner
from luthier.training.noise import noisy_inputs
from luthier.training.objectives.part import Objective, Tally

# Beyond this many times its start (and at least this much), a loss is not coming back.
DIVERGED = 1000.0


def take_step(learner: Learner, rows: Sequence[Encoded] | None, events: Events) -> tuple[float, float]:
    """Learn from `rows`, of which each process takes its share: (mean loss, gradient norm), the same in all of them.
    None: from those of the step before, as they were drawn for it.

    The loss is summed over micro-batches and divided once by the weight of the whole step, so how the rows are split
    changes nothing. Where memory runs out micro-batches are halved for the rest of the run, and the step begins again.
    Raises TrainingError on a non-finite or runaway loss, before the weights move, and where memory runs out at one row.
    """
    progress, model, world = learner.progress, learner.model, learner.world
    seed = (learner.settings.seed, progress.step)
    given = rows
    if rows is None:
        rows = learner.drawn
    else:
        rows = [rows[at] for at in deal(lengths_of(rows), world.size)[world.rank]]
        with learner.whole() if learner.objective.draws else nullcontext():
            rows = learner.objective.draw(rows, model, seed, world.sum)
        learner.drawn = rows if learner.objective.repeats() > 1 else ()
    factor = learner.schedule.factor(progress.step, learner.settings.steps)
    for group in learner.engine.param_groups:
        group["lr"] = group["base_lr"] * factor
    draws = draw_state(model.device)
    while (added := _add_up(learner, rows, given, seed)) is None:
        _halve(learner, rows, events)
        restore_draws(draws, model.device)
    learner.tally = _tally(learner, [learner.objective.tally(rows), *added.tallies])
    if learner.sharded is None:
        world.add_gradients([parameter for _, parameter in learner.parameters])
    norm = _clip([parameter for _, parameter in learner.parameters], learner.settings.clip)
    mean, names = added.mean, added.names
    if not math.isfinite(norm):
        raise _diverged(f"is {mean:.4g} but its gradient is {norm}", progress.step, names, learner.rate)
    if progress.first_loss is None:
        progress.first_loss = mean
    if mean > DIVERGED * max(progress.first_loss, 1.0):
        raise _diverged(f"went from {progress.first_loss:.4g} to {mean:.4g}", progress.step, names, learner.rate)
    learner.engine.step()
    if learner.sharded is None:
        # Fused optimisers do not say that they wrote; what is remembered of a weight (a norm) goes by its version.
        torch.autograd.graph.increment_version([parameter for _, parameter in learner.parameters])
    if learner.ema is not None:
        learner.ema.update()
    learner.engine.zero_grad(set_to_none=True)
    progress.tokens += added.tokens
    return mean, norm


@dataclass(frozen=True, slots=True)
class _Added:
    """The gradients of a step lie in the weights; of its rows the mean loss, in all processes, and the names."""

    mean: float
    tokens: int
    names: list[str]
    tallies: list[Tally]
    """What the objective counted in what it measured."""


def _add_up(
    learner: Learner, rows: Sequence[Encoded], given: Sequence[Encoded] | None, seed: tuple[int, ...]
) -> _Added | None:
    """Forward and back through each micro-batch of `rows`, the share of this process of all that were `given`; None where
    memory ran out in any process, with gradients to forget."""
    settings, progress, model, world = learner.settings, learner.progress, learner.model, learner.world
    lengths = lengths_of(rows)
    parts = math.ceil(settings.accumulate / world.size)
    micro = [
        learner.objective.batch([rows[at] for at in part], model, seed)
        for part in split_step(range(len(rows)), lengths, parts, settings.micro_tokens)
    ]
    weight, tokens = world.sum(sum(batch.weight for batch in micro), sum(batch.tokens for batch in micro))
    counted = len(micro)
    if learner.sharded is not None:
        # Gathering a layer takes all processes, so each makes as many passes as the one with the most.
        idle = _any_row(learner, rows) if learner.objective.draws else (given or ())[:1]
        micro += [learner.objective.batch(idle, model, seed) for _ in range(world.most(counted) - counted)]
    total, short = 0.0, False
    tallies = []
    for at, batch in enumerate(micro):
        try:
            with noisy_inputs(model, batch.to(model.device), settings.noise, seed):
                loss, seen = learner.measure(batch)
                share = loss.sum if at < counted else loss.sum * 0
                # Sharded gradients come back as means over the processes; the others are added up later.
                (share * (1 if learner.sharded is None else world.size) / weight).backward()  # type: ignore[no-untyped-call]
            if seen is not None and at < counted:
                tallies.append(learner.objective.observe(seen.detach()))
            value = float(share.detach())
        except (RuntimeError, MemoryError) as err:
            if not out_of_memory(err) or learner.sharded is not None:
                raise
            short = True
            break
        total += value
        if not math.isfinite(value):
            raise _diverged(f"is {value}", progress.step, batch.names, learner.rate)
    total, failed = world.sum(total, float(short))
    if failed:
        return None
    return _Added(total / weight, int(tokens), [name for batch in micro[:counted] for name in batch.names], tallies)


def _halve(learner: Learner, rows: Sequence[Encoded], events: Events) -> None:
    """Forget the gradients of a step that ran out of memory, and let half as many tokens through at once from now on."""
    learner.engine.zero_grad(set_to_none=True)
    learner.model.module.zero_grad(set_to_none=True)
    return_freed_memory(learner.model.device)
    lengths = lengths_of(rows) or [0]
    # All processes do the same, whichever of them it was.
    longest, most = learner.world.most(max(lengths)), learner.world.most(sum(lengths))
    before = min(learner.settings.micro_tokens, most)
    if before <= longest:
        raise TrainingError(
            f"step {learner.progress.step + 1}: memory ran out with one row of {longest} tokens at once; set checkpointing: "
            "layers or a shorter max_length, or choose adapter lora, quantize: nf4 or a smaller model"
        )
    half = max(longest, before // 2)
    learner.settings = replace(learner.settings, micro_tokens=half)
    events.warn(f"memory ran out, so {half} tokens go through the model at once from now on; the result is the same", 1)


def _any_row(learner: Learner, rows: Sequence[Encoded]) -> Sequence[Encoded]:
    """One row as it was drawn, of any process."""
    return [next(row for row in learner.world.gather(rows[0] if rows else None) if row is not None)]


def _tally(learner: Learner, tallies: Sequence[Tally]) -> dict[str, float]:
    """The means of what the objective counted, of all processes."""
    kind = type(learner.objective)
    if kind.tally is Objective.tally and kind.observe is Objective.observe:
        return {}
    found: dict[str, list[tuple[float, float]]] = {}
    for part in (one for parts in learner.world.gather(list(tallies)) for one in parts):
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
