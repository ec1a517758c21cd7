"""How fast a machine computes what a rehearsal counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch

# Seconds that an operation costs whatever its size, on the CPU and on a GPU that is kept waiting.
CALL = 6e-6
# The share of the speed of large products that those of a step reach (share_of_peak in benchmarks/tuning.py).
REACHED = {torch.bfloat16: 0.65}
# Sizes of the products and copies by which a machine's speed is measured: typical of a layer, and beyond its caches.
ROWS, INNER, OUTER, COPIED = 512, 768, 1024, 2**25


@dataclass(slots=True)
class Machine:
    """How fast a device multiplies and copies, measured once."""

    device: torch.device
    products: dict[torch.dtype, float] = field(default_factory=dict)
    copied: float = 0.0

    @staticmethod
    def of(device: torch.device) -> Machine:
        return _MACHINES.setdefault(device, Machine(device))

    def seconds(self, flops: dict[torch.dtype, float], moved: float, operations: int) -> float:
        """For products, copies and calls, one after another."""
        if not self.copied:
            self.copied = self._copy()
        for dtype in flops:
            if dtype not in self.products:
                self.products[dtype] = self._multiply(dtype)
        multiplied = sum(count / (self.products[dtype] * REACHED.get(dtype, 1.0)) for dtype, count in flops.items())
        return multiplied + moved / self.copied + operations * CALL

    def _multiply(self, dtype: torch.dtype) -> float:
        left, right = (torch.ones(shape, dtype=dtype, device=self.device) for shape in ((ROWS, INNER), (INNER, OUTER)))
        return 2.0 * ROWS * INNER * OUTER / self._time(lambda: left @ right)

    def _copy(self) -> float:
        source = torch.ones(COPIED // 4, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * COPIED / self._time(lambda: target.copy_(source))

    def _time(self, work: Callable[[], object]) -> float:
        """The faster of two, after one that warms up: a run waits for it."""
        taken = []
        for _ in range(3):
            started = perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken.append(perf_counter() - started)
        return min(taken[1:])


_MACHINES: dict[torch.device, Machine] = {}
