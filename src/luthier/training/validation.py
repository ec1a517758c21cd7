"""Looking at the held-out rows between steps, and keeping the best weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.batches import fill_batches
from luthier.models.spec import LoadedModel
from luthier.training.checkpoint import Checkpoints
from luthier.training.learner import Learner
from luthier.training.objectives.part import Objective


def look(learner: Learner, validation: Sequence[Encoded], checkpoints: Checkpoints, events: Events) -> None:
    """Validate; keep the weights if they are the best so far. Of averages, where any are kept."""
    with learner.averaged():
        _look(learner, validation, checkpoints, events)


def _look(learner: Learner, validation: Sequence[Encoded], checkpoints: Checkpoints, events: Events) -> None:
    objective, progress = learner.objective, learner.progress
    found = validate(learner.model, objective, validation, tokens=learner.settings.micro_tokens)
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
def validate(model: LoadedModel, objective: Objective, rows: Sequence[Encoded], *, tokens: int) -> dict[str, float]:
    """Mean loss by weight, of all rows and of each of several sources, and the objective's own metrics. Independent of
    `tokens`, of which so many go through the model at once, but for rounding."""
    training = model.module.training
    model.module.eval()
    sources = list(dict.fromkeys(row.source for row in rows))
    totals = dict.fromkeys(sources, (0.0, 0.0))
    scores: list[Tensor] = []
    gold: list[Tensor] = []
    try:
        examined = objective.examine(model, rows, tokens=tokens)
        if examined is not None:
            return examined
        for source, part in _batches(rows, sources, tokens):
            batch = objective.batch(part, model, (0, 0)).to(model.device)
            loss, seen = objective.measure(model, batch)
            total, weight = totals[source]
            totals[source] = total + float(loss.sum), weight + loss.weight
            if seen is not None and batch.gold is not None:
                scores.append(seen.float().cpu())
                gold.append(batch.gold.cpu())
    finally:
        model.module.train(training)
    extra = objective.metrics(torch.cat(scores), torch.cat(gold), model) if scores else {}
    total, weight = (sum(parts) for parts in zip(*totals.values()))
    named = {f"loss/{name}": part / held for name, (part, held) in totals.items() if name and held}
    return {"loss": total / weight, **extra, **named}


def _batches(rows: Sequence[Encoded], sources: Sequence[str], tokens: int) -> Iterator[tuple[str, list[Encoded]]]:
    """Rows of one source at a time, with its name."""
    for source in sources:
        held = [row for row in rows if row.source == source]
        for part in fill_batches([len(row.ids) + len(row.target) for row in held], tokens):
            yield source, [held[at] for at in part]
