"""Containers of tensors through a group of processes: the containers first, then the tensors one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Absent:
    """The place of a tensor that follows."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def lift(tree: Any, tensors: list[Tensor]) -> Any:
    """`tree` with its tensors taken out into `tensors`."""
    if isinstance(tree, Tensor):
        tensors.append(tree.detach().cpu().contiguous())
        return _Absent(tuple(tree.shape), tree.dtype)
    if isinstance(tree, dict):
        return {key: lift(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([lift(value, tensors) for value in tree])
    return tree


def fill(tree: Any, tensors: Iterator[Tensor] | None, group: dist.ProcessGroup | None) -> Any:
    """`tree` with its tensors broadcast, one after another; `tensors` are the leader's."""
    if isinstance(tree, _Absent):
        one = torch.empty(tree.shape, dtype=tree.dtype) if tensors is None else next(tensors)
        dist.broadcast(one, 0, group=group)
        return one
    if isinstance(tree, dict):
        return {key: fill(value, tensors, group) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([fill(value, tensors, group) for value in tree])
    return tree
