"""Gradients of several processes, added up in buckets: while one goes through the wires the next is laid out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

# Values of gradients that are added up at once.
BUCKET = 2**24


@torch.no_grad()
def add_up(parameters: Sequence[Parameter], host: dist.ProcessGroup | None) -> None:
    """Add up every gradient over all processes. One that has none adds nothing; where none has any, none is made."""
    given = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    dist.all_reduce(given, dist.ReduceOp.MAX, group=host)
    held = [parameter for parameter, found in zip(parameters, given.tolist()) if found]
    for parameter in held:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    pending: deque[tuple[list[Parameter], Tensor, Any]] = deque()
    for bucket in _buckets(held):
        flat = torch.cat([parameter.grad.flatten() for parameter in bucket])  # type: ignore[union-attr]
        pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        # While one goes through the wires the next is laid out.
        if len(pending) > 1:
            _take_back(*pending.popleft())
    while pending:
        _take_back(*pending.popleft())


def _buckets(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    bucket: list[Parameter] = []
    for parameter in parameters:
        if bucket and sum(one.numel() for one in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _take_back(bucket: list[Parameter], flat: Tensor, work: Any) -> None:
    work.wait()
    pieces = flat.split([one.numel() for one in bucket])  # type: ignore[no-untyped-call]
    for parameter, piece in zip(bucket, pieces):
        parameter.grad.copy_(piece.view_as(parameter))  # type: ignore[union-attr]
