"""What ends a run at once rather than after a night: training that trains nothing, a file that is another model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.core.errors import TrainingError
from luthier.models.packed import hidden_states
from luthier.models.spec import LoadedModel
from luthier.training.world import ALONE, World

# Values of each weight that are watched, and tokens on which two models are compared.
WATCHED, TRIED = 64, 32
# What rounding may change between a model in memory and the same from its files, relative to its states.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def check_learning(model: LoadedModel, parameters: Sequence[tuple[str, Parameter]]) -> None:
    """Raises TrainingError when the weights that get a gradient are not those that the optimiser moves."""
    given = {id(parameter) for _, parameter in parameters}
    open_ones = [(name, one) for name, one in model.module.named_parameters() if one.requires_grad]
    lost = [name for name, one in open_ones if id(one) not in given]
    held = {id(one) for _, one in open_ones}
    strange = [name for name, one in parameters if id(one) not in held]
    if lost or strange:
        shown = f"{lost[0]} would learn and is not moved" if lost else f"{strange[0]} is moved and cannot learn"
        raise TrainingError(
            f"the adapter and the optimiser hold different weights ({shown}), so training would be in vain; "
            "please report it with the run's config.yaml"
        )


class Watch:
    """Some values of each learning weight as they were, to see whether any moves."""

    def __init__(self, parameters: Sequence[tuple[str, Parameter]]):
        self._parameters = [parameter for _, parameter in parameters]
        self._before = [_sample(parameter) for parameter in self._parameters]

    def check(self, rate: float, world: World = ALONE) -> None:
        """Raises TrainingError when a step at a `rate` above zero moved nothing."""
        moved = any(not torch.equal(_sample(one), before) for one, before in zip(self._parameters, self._before))
        if not world.any(moved) and rate > 0:
            raise TrainingError(
                f"no weight moved in the first step, at a learning rate of {rate:g}: it is too small for the precision of "
                "the weights, or no gradient reaches them; raise learning_rate"
            )


@torch.no_grad()
def same_model(model: LoadedModel, other: LoadedModel, ids: Sequence[int]) -> bool:
    """Whether two models have the same states and the same head for the first of `ids`, but for rounding."""
    part = torch.tensor(ids[:TRIED], device=model.device)
    ours, theirs = (hidden_states(one, part.to(one.device), [len(part)]).float().cpu() for one in (model, other))
    limit = TOLERANCE[model.network.dtype] * float(ours.abs().max())
    heads = zip(_head(model), _head(other))
    return float((ours - theirs).abs().max()) <= limit and all(torch.equal(a, b) for a, b in heads)


def _head(model: LoadedModel) -> list[Tensor]:
    """The weights of the head outside the network's body."""
    body = {id(one) for one in model.network.base_model.parameters()}
    return [one.detach().cpu() for one in model.module.parameters() if id(one) not in body]


def _sample(parameter: Parameter) -> Tensor:
    held = parameter.detach()
    flat = getattr(held, "to_local", lambda: held)().flatten()  # of a sharded weight what lies here
    return flat[:: max(1, len(flat) // WATCHED)].clone()
