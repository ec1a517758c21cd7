"""Weights that lie in a file and are read from it as they are touched: memory can let go of them, and they come back.

safetensors maps files into memory (mmap(2)), so that weights which stay as they are stored are pages of the file. What was
read of them stays resident; a process that is done with them for now gives those pages back (madvise(2), MADV_DONTNEED).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

MADV_DONTNEED = 4
# Bytes of weights that layers read before their pages are given back: to read them again takes a while.
AT_ONCE = 2**25
# What is mapped, and a number of 64 bits for each page of memory (proc_pid_pagemap(5)): in memory, swapped out, of a file.
MAPS, PAGES = Path("/proc/self/maps"), "/proc/self/pagemap"
HERE, SWAPPED, OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


@dataclass(frozen=True)
class Region:
    """Where a part of a file lies in memory."""

    start: int
    end: int
    offset: int
    path: str

    @cached_property
    def whole(self) -> bool:
        """Whether none of its pages was written to since, which would be memory of no file; False where the system does not
        tell."""
        count = (self.end - self.start) // mmap.PAGESIZE
        try:
            with open(PAGES, "rb", buffering=0) as file:
                found = os.pread(file.fileno(), 8 * count, 8 * (self.start // mmap.PAGESIZE))
        except OSError:
            return False
        pages = np.frombuffer(found, np.uint64)
        written = ((pages & (HERE | SWAPPED)) != 0) & ((pages & OF_FILE) == 0)
        return len(pages) == count and not written.any()


@dataclass(frozen=True, slots=True)
class Twin:
    """Where a weight lies in memory that is, number for number, what a file holds in another precision."""

    start: int
    end: int
    offset: int
    path: str
    dtype: str
    """Of the file."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's numbers in a file: how many bytes before them, their precision there, its shape and strides, and the precision
    that they are read in where it is another."""

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    cast: str | None = None


def read_regions() -> list[Region]:
    """The files that are mapped into this process. Empty where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        text = MAPS.read_text()
    except OSError:
        return []
    return [Region(int(one[1], 16), int(one[2], 16), int(one[3], 16), one[4]) for one in LINES.finditer(text)]


# Address, rights, offset, device, inode, path: memory of no file has the inode 0.
LINES = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ [1-9]\d* *(.*)$", re.MULTILINE)


def find_mapped(network: nn.Module) -> list[tuple[int, int]]:
    """(address, bytes) of the mapped files in which weights of `network` lie, none of whose pages was written to since: what
    was would be lost. Empty where the system does not tell."""
    weights = sorted(one.data_ptr() for one in network.parameters())
    return [
        (one.start, one.end - one.start)
        for one in read_regions()
        if bisect_left(weights, one.start) < bisect_left(weights, one.end) and one.whole
    ]


def letting_go(network: nn.Module) -> Callable[[], None]:
    """What gives back the pages of the weights that were read since; nothing is done where they lie in no file."""
    places = find_mapped(network)

    def let_go() -> None:
        for start, size in places:
            _library().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_DONTNEED)

    return let_go


@contextmanager
def by_layers(network: nn.Module) -> Iterator[Callable[[], None]]:
    """Inside, the pages of weights in a file that layers read are given back after some of them; gives what does that, for all
    others."""
    let_go, read = letting_go(network), 0

    def count(layer: nn.Module, *_: object) -> None:
        nonlocal read
        read += sum(one.nbytes for one in layer.parameters())
        if read >= AT_ONCE:
            read = 0
            let_go()

    stacks = [one for one in network.modules() if isinstance(one, nn.ModuleList)]
    hooks = [layer.register_forward_hook(count) for stack in stacks for layer in stack]
    try:
        yield let_go
    finally:
        for hook in hooks:
            hook.remove()
        let_go()


def place_of(tensor: Tensor, regions: Sequence[Region], twins: Sequence[Twin] = ()) -> Place | None:
    """Where the numbers of `tensor` lie in a file, or those that they were cast from; None where they lie in none, or were
    written to."""
    at, size = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    end, dtype = at + min(size, tensor.numel() * tensor.element_size()), str(tensor.dtype).removeprefix("torch.")
    for one in regions:
        if one.start <= at and end <= one.end and one.whole:
            return Place(one.path, at - one.start + one.offset, dtype, tuple(tensor.shape), tensor.stride())
    for other in twins:
        if other.start <= at and end <= other.end:
            before = (at - other.start) // tensor.element_size() * getattr(torch, other.dtype).itemsize
            place = other.path, other.offset + before, other.dtype
            return Place(*place, tuple(tensor.shape), tensor.stride(), dtype)
    return None


class Files:
    """Files mapped into memory anew, for tensors whose places in them are known."""

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}

    def tensor(self, place: Place) -> Tensor:
        """The tensor at a place. Raises OSError for a file that is not there, and ValueError for one that is too short."""
        if place.path not in self._maps:
            with open(place.path, "rb") as file:
                # Pages of one's own, were they written to: torch would warn of others.
                self._maps[place.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = 1 + sum((size - 1) * step for size, step in zip(place.shape, place.strides))
        flat = torch.frombuffer(
            self._maps[place.path], dtype=getattr(torch, place.dtype), count=count, offset=place.offset
        )
        found = flat.as_strided(place.shape, place.strides)
        return found if place.cast is None else found.to(getattr(torch, place.cast))

    def let_go(self) -> None:
        """Give back the pages that were read."""
        for one in self._maps.values():
            one.madvise(MADV_DONTNEED)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
