"""What learns, in fp32: the weights themselves, or masters of weights that compute in a smaller precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


class Masters:
    """For each learning weight its fp32 self, which the optimiser moves (Micikevicius et al. 2018, arXiv:1710.03740).

    A weight in fp32 is its own master. The gradients of the others are added up in fp32 as each backward pass makes
    them, so that micro-batches lose nothing to rounding; `publish` gives the moved masters back to the model.
    """

    def __init__(self, parameters: Sequence[tuple[str, Parameter]]):
        self.parameters: list[tuple[str, Parameter]] = []
        self._pairs: list[tuple[Parameter, Parameter]] = []
        self._hooks = []
        for name, weight in parameters:
            if weight.dtype == torch.float32:
                self.parameters.append((name, weight))
                continue
            master = Parameter(weight.detach().float())
            self.parameters.append((name, master))
            self._pairs.append((weight, master))
            self._hooks.append(weight.register_post_accumulate_grad_hook(_collector(master)))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights that compute."""
        for weight, master in self._pairs:
            weight.copy_(master)

    def close(self) -> None:
        """Let go of the weights."""
        for hook in self._hooks:
            hook.remove()


def _collector(master: Parameter):  # type: ignore[no-untyped-def]
    def collect(weight: Tensor) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad += weight.grad
        weight.grad = None

    return collect
