"""What one tuning holds while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.models.spec import LoadedModel
from luthier.training.checkpoint import Progress
from luthier.training.objectives.part import Objective
from luthier.training.schedules.part import Schedule


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
    checkpoint_every: int
    """Steps between checkpoints beside those at validations; 0: none."""
    seed: int


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

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.engine.param_groups[0]["lr"])

    def weights(self) -> dict[str, Tensor]:
        """What learns, by name."""
        return {name: parameter.detach() for name, parameter in self.parameters}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Put `weights` into what learns."""
        for name, parameter in self.parameters:
            parameter.copy_(weights[name])
