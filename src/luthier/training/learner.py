"""What one tuning holds while it learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.core.types import Encoded
from luthier.data.batches import Batch
from luthier.models.spec import LoadedModel
from luthier.training.averages import Averages, MovingAverage
from luthier.training.checkpoint import Progress
from luthier.training.masters import Masters
from luthier.training.objectives.part import Loss, Objective
from luthier.training.schedules.part import Schedule
from luthier.training.world import ALONE, World

if TYPE_CHECKING:
    from luthier.training.sharding import Sharded


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, how much at a time, and how often to look. Plain numbers: everything "auto" is decided by now."""

    steps: int
    batch_size: int
    """Rows of one optimiser step."""
    accumulate: int
    """Least number of micro-batches a step is split into; the result does not depend on it."""
    micro_tokens: int
    """Most tokens of a micro-batch; a longer row is one alone."""
    learning_rate: float
    clip: float
    """Largest norm of the gradient; 0 leaves it alone."""
    validate_every: int
    """Steps between validations; 0: only at the end."""
    patience: int
    """Validations without improvement before stopping early; 0: never."""
    checkpoint_every: int | None
    """Steps between checkpoints; 0: none before the last step; None: as often as takes little of the time."""
    seed: int
    ema: float = 0.0
    """Decay of a moving average of the weights; 0: none is kept."""
    noise: float = 0.0
    """NEFTune's alpha; 0: none."""


@dataclass(slots=True)
class Learner:
    """A model, what it learns, and what moves its weights: handed from step to validation to checkpoint."""

    model: LoadedModel
    objective: Objective
    parameters: Sequence[tuple[str, Parameter]]
    """What the optimiser moves, in fp32."""
    engine: torch.optim.Optimizer
    schedule: Schedule
    settings: Settings
    progress: Progress = field(default_factory=Progress)
    tally: dict[str, float] = field(default_factory=dict)
    """What the objective counted in the rows of the last step."""
    drawn: Sequence[Encoded] = ()
    """The rows of the last step that this process learned from, where another step learns from them again."""
    masters: Masters | None = None
    ema: MovingAverage | None = None
    world: World = ALONE
    sharded: Sharded | None = None
    """The model with its weights shared out over the processes, where they are."""

    @property
    def rate(self) -> float:
        """The learning rate of the last step, of weights without a scale of their own."""
        group = self.engine.param_groups[0]
        return float(group["lr"] / group.get("scale", 1.0))

    @property
    def averages(self) -> Averages | None:
        """What holds the weights to look at and to save, when these are not the weights that learn."""
        engine: Any = self.engine
        return self.ema or (engine if hasattr(engine, "eval") else None)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the averages, if any are kept; after it what learns, bit for bit."""
        self.settle()
        try:
            yield
        finally:
            if self.averages is not None:
                self.averages.train()
                self.publish()

    def settle(self) -> None:
        """Give the model the averages, if any are kept."""
        if self.averages is not None:
            self.averages.eval()
            self.publish()

    def publish(self) -> None:
        """Round what learns into the weights that compute."""
        if self.masters is not None:
            self.masters.publish()

    def measure(self, batch: Batch) -> tuple[Loss, Tensor | None]:
        """The objective's measure of a batch, on the model as it lies."""
        if self.sharded is None:
            return self.objective.measure(self.model, batch)
        return self.sharded.measure(self.objective, self.model, batch)

    def whole(self) -> AbstractContextManager[None]:
        """Inside, the model can be run outside `measure`; all processes must enter together."""
        return nullcontext() if self.sharded is None else self.sharded.whole()

    def weights(self) -> dict[str, Tensor]:
        """What learns, by name."""
        return {name: parameter.detach() for name, parameter in self.parameters}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Put `weights` into what learns."""
        for name, parameter in self.parameters:
            parameter.copy_(weights[name])
