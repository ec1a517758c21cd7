"""Looking at the held-out rows between steps, and keeping the best weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.batches import Batch, deal, fill_batches
from luthier.data.cache import lengths_of
from luthier.engine.passes import each_part
from luthier.models.spec import LoadedModel
from luthier.training.checkpoint import Checkpoints
from luthier.training.learner import Learner
from luthier.training.objectives.part import Loss, Objective
from luthier.training.world import ALONE, World


def look(learner: Learner, validation: Sequence[Encoded], checkpoints: Checkpoints, events: Events) -> None:
    """Validate; keep the weights if they are the best so far. Of averages, where any are kept."""
    with learner.averaged():
        _look(learner, validation, checkpoints, events)


def _look(learner: Learner, validation: Sequence[Encoded], checkpoints: Checkpoints, events: Events) -> None:
    objective, progress = learner.objective, learner.progress
    found = validate(
        learner.model,
        objective,
        validation,
        tokens=learner.settings.micro_tokens,
        world=learner.world,
        measure=learner.measure,
        even=learner.sharded is not None,
        whole=learner.whole,
        events=events,
    )
    name, sign = objective.metric if objective.metric[0] in found else ("loss", -1)
    # A metric of few rows is often equal: then the lower loss is the better model.
    value = (found[name] * sign, -found["loss"])
    better = progress.best_value is None or value > tuple(progress.best_value)
    if better:
        progress.best_value, progress.best_step, progress.stale = value, progress.step, 0
        checkpoints.save("best", learner.weights(), {"step": progress.step})
    else:
        progress.stale += 1
    progress.history.append({"step": progress.step, **found})
    events.emit("validate", step=progress.step, best=better, judged_by=name, **found)


@torch.no_grad()
def validate(
    model: LoadedModel,
    objective: Objective,
    rows: Sequence[Encoded],
    *,
    tokens: int,
    world: World = ALONE,
    measure: Callable[[Batch], tuple[Loss, Tensor | None]] | None = None,
    even: bool = False,
    whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    events: Events | None = None,
) -> dict[str, float]:
    """Mean loss by weight, of all rows and of each of several sources, and the objective's own metrics. Independent of
    `tokens`, of which so many go through the model at once (fewer once memory ran out), and of the number of processes,
    each of which takes its share, but for rounding.

    `measure` stands in for the objective's own; `even`: each process makes as many passes as the one with the most.
    Inside `whole` the model can be run by itself.
    """
    measure = measure or (lambda batch: objective.measure(model, batch))
    mine = deal(lengths_of(rows), world.size)[world.rank]
    training = model.module.training
    model.module.eval()
    sources = list(dict.fromkeys(row.source for row in rows))
    totals = dict.fromkeys(sources, (0.0, 0.0))
    scores: list[Tensor] = []
    gold: list[Tensor] = []
    try:
        if type(objective).examine is not Objective.examine:
            with whole():
                examined = objective.examine(model, rows, tokens=tokens)
            if examined is not None:
                return world.spread(examined)  # type: ignore[no-any-return]
        held = {source: [rows[at] for at in mine if rows[at].source == source] for source in sources}

        def take(source: str, part: Sequence[Encoded], counts: bool = True) -> None:
            batch = objective.batch(part, model, (0, 0)).to(model.device)
            loss, seen = measure(batch)
            if not counts:
                return
            total, weight = totals[source]
            totals[source] = total + float(loss.sum), weight + loss.weight
            if seen is not None and batch.gold is not None:
                scores.append(seen.float().cpu())
                gold.append(batch.gold.cpu())

        if even:
            parts = [(source, part) for source in sources for part in fill_batches(lengths_of(held[source]), tokens)]
            # Counted before the first pass: a layer is gathered by all at once, and so is the largest number.
            more = world.most(len(parts)) - len(parts)
            for source, part in parts:
                take(source, [held[source][at] for at in part])
            for _ in range(more):
                take(sources[0], rows[:1], counts=False)
        else:
            for source in sources:

                def run(part: list[int], source: str = source) -> None:
                    take(source, [held[source][at] for at in part])

                each_part(lengths_of(held[source]), tokens, run, model.device, events)
    finally:
        model.module.train(training)
    summed = world.sum(*(number for pair in totals.values() for number in pair))
    totals = dict(zip(sources, zip(summed[::2], summed[1::2])))
    both = [pair for pairs in world.gather(list(zip(scores, gold))) for pair in pairs]
    extra: dict[str, float] = {}
    if both:
        found_S, gold_S = (torch.cat(side) for side in zip(*both))
        extra = objective.metrics(found_S, gold_S, model)
    total, weight = (sum(parts) for parts in zip(*totals.values()))
    named = {f"loss/{name}": part / held for name, (part, held) in totals.items() if name and held}
    # One process speaks for all: they must agree on which weights are the best.
    return world.spread({"loss": total / weight, **extra, **named})  # type: ignore[no-any-return]
