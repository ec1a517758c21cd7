"""A ceiling for what an allocator keeps."""

from __future__ import annotations

import torch

from luthier.models.memory import held_memory, return_freed_memory
from luthier.training.forecast import Plan

# Steps between two returns of freed memory, which cost page faults at the next step.
STEPS = 10


class Ceiling:
    """Gives freed memory back where a process holds more than its forecast: never in use, but never returned either."""

    def __init__(self, device: torch.device, plan: Plan | None):
        self._device = device
        self._most = None if plan is None else plan.most
        self._waited = 0

    def keep(self) -> None:
        """After a step, when little is in use."""
        self._waited += 1
        if self._most is None or self._device.type != "cpu" or self._waited < STEPS:
            return
        if held_memory(self._device) > self._most:
            return_freed_memory(self._device)
            self._waited = 0
