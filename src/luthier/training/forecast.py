"""What a tuning will hold in memory at most, and how long it will take, said before its first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from luthier.core.types import Encoded
from luthier.data.cache import lengths_of
from luthier.models.checkpointing import Checkpointing
from luthier.models.memory import held_memory, library_memory
from luthier.models.rehearsal import META, SLACK, Ledger, as_it_is, rehearse
from luthier.models.spec import LoadedModel
from luthier.training.learner import Settings
from luthier.training.machine import Machine
from luthier.training.masters import Masters
from luthier.training.noise import noisy_inputs
from luthier.training.objectives.part import Objective
from luthier.training.optimizers.part import Optimizer


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes by what they are for, and seconds. `total` is the most that is held at once."""

    process: int
    """What the process holds before the first step: weights, data, libraries; on a GPU the weights alone."""
    weights: int
    """Of that, the model."""
    loading: int
    """What it held while the model was loaded: more, where the weights are shared out after that."""
    masters: int
    """fp32 selves of weights in a smaller precision."""
    optimizer: int
    """What the optimiser and averages keep beside what learns."""
    gradients: int
    activations: int
    """Most that the largest micro-batch holds at once on its way forward and back, its gradients left out."""
    validation: int
    """Most that the largest batch of held-out rows holds at once."""
    writing: int
    """Keys and values of the answers that are written at once between two steps."""
    tokens: int
    """Of the largest micro-batch."""
    seconds: float
    """That it takes."""

    @property
    def kept(self) -> int:
        """What is held between steps."""
        return self.process + self.masters + self.optimizer

    @property
    def total(self) -> int:
        return max(self.loading, self.kept + max(self.gradients + self.activations, self.validation, self.writing))

    @property
    def parts(self) -> dict[str, int]:
        """For people and records."""
        return {
            "weights": self.weights,
            "process": self.process - self.weights,
            "masters": self.masters,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "activations": self.activations,
            "validation": self.validation,
            "writing": self.writing,
            "total": self.total,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run goes through the model, the largest of it, and what that is predicted to take."""

    settings: Settings
    checkpointing: Checkpointing
    rows: Sequence[Encoded]
    """The largest micro-batch of the run."""
    held_out: Sequence[Encoded]
    """The largest batch of held-out rows."""
    forecast: Forecast | None
    """None where this model's code does not run without values."""
    limit: int | None
    """Bytes that may be held; None where nobody knows."""
    seconds: float | None = None
    """Predicted for all steps."""
    most: int | None = None
    """Bytes that are predicted at most; in each of several processes what the first predicted for itself."""


def foresee(
    model: LoadedModel,
    objective: Objective,
    parameters: Sequence[Parameter],
    optimizer: Optimizer,
    rows: Sequence[Encoded],
    held_out: Sequence[Encoded],
    *,
    several: bool,
    averages: bool = False,
    noise: float = 0.0,
    shards: int = 1,
    writing: int = 0,
) -> Forecast:
    """Rehearse the largest micro-batch, `rows`, and the largest batch of held-out rows (or none) without their numbers.

    `several`: a step has more than one micro-batch, so that gradients lie beside the next one's activations. `shards`:
    the processes that will share weights, gradients and what the optimiser keeps; each holds whole ones of one layer at a
    time, which is left out, as is what lies outside the layers. Rows must not need a draw (see `Objective.stand_in`). May
    raise whatever the model's code raises on tensors without values.
    """
    trainable = sum(one.numel() for one in parameters)
    wide = sum(one.numel() for one in parameters if one.dtype != torch.float32)
    weights = sum(one.nbytes for one in (*model.module.parameters(), *model.module.buffers()))
    models = [model, *objective.companions()]
    continued = any(up >= 0 for row in (*rows, *held_out) for up in row.parents)
    with ExitStack() as entered:
        for one in models:
            entered.enter_context(as_it_is(one, continued=continued))
        # Only now: weights that lie in a mapped file are held from when they are first looked at.
        process = held_memory(model.device)
        with rehearse([one.module for one in models], model.device) as ledger:
            stand_ins = [ledger.stand_ins[id(one)] for one in parameters]
            masters = Masters([(str(at), one) for at, one in enumerate(stand_ins)])  # type: ignore[misc]
            if several:
                for _, stand_in in masters.parameters:
                    stand_in.grad = torch.empty_like(stand_in)
            before = ledger.held
            ledger.mark()
            model.module.train()
            batch = objective.batch(rows, model, (0, 0)).to(META)
            with noisy_inputs(model, batch, noise, (0, 0)):
                loss, _ = objective.measure(model, batch)
                loss.sum.backward()  # type: ignore[no-untyped-call]
            learned = sum(one.grad.nbytes for _, one in masters.parameters if one.grad is not None)
            peak = ledger.peak - before
            activations = peak if several else max(peak - learned, 0)
            work = (dict(ledger.flops), ledger.moved, ledger.operations)
            masters.close()
            del masters, loss, stand_ins, batch
            validation = _look(model, objective, held_out, ledger) if held_out else 0
    seconds = Machine.of(model.device).seconds(*work)
    given_away = weights - math.ceil(weights / shards)
    return Forecast(
        process=process - given_away + library_memory(model.device, model.network.dtype),
        weights=weights - given_away,
        loading=process,
        masters=math.ceil(4 * wide / shards),
        optimizer=math.ceil(4 * (optimizer.slots + averages) * trainable / shards),
        gradients=math.ceil(4 * trainable / shards),
        activations=math.ceil(activations * SLACK),
        validation=math.ceil(validation * SLACK),
        writing=writing,
        tokens=sum(lengths_of(rows)),
        seconds=seconds,
    )


@torch.no_grad()
def _look(model: LoadedModel, objective: Objective, rows: Sequence[Encoded], ledger: Ledger) -> int:
    before = ledger.held
    ledger.mark()
    model.module.eval()
    objective.measure(model, objective.batch(rows, model, (0, 0)).to(META))
    return ledger.peak - before
