"""Weights that lie in a file and are read from it as they are touched: memory can let go of them, and they come back.

safetensors maps files into memory (mmap(2)), so that weights which stay as they are stored are pages of the file. What was
read of them stays resident; a process that is done with them for now gives those pages back (madvise(2), MADV_DONTNEED).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

MADV_DONTNEED = 4
MAPS = Path("/proc/self/smaps")


def find_mapped(network: Any) -> list[tuple[int, int]]:
    """(address, bytes) of the mapped files in which weights of `network` lie, none of whose pages was written to since: what
    was would be lost. Empty where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        text = MAPS.read_text()
    except OSError:
        return []
    weights = sorted(one.data_ptr() for one in network.parameters())
    found, start, end = [], 0, 0
    for line in text.splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, _, last = name.partition("-")
            # Address, rights, offset, device, inode, path: memory of no file has the inode 0.
            start, end = (int(first, 16), int(last, 16)) if rest[3] != "0" else (0, 0)
        elif name == "Anonymous:" and rest[0] == "0" and end and any(start <= one < end for one in weights):
            found.append((start, end - start))
    return found


def letting_go(network: Any) -> Callable[[], None]:
    """What gives back the pages of the weights that were read since; nothing is done where they lie in no file."""
    places = find_mapped(network)

    def let_go() -> None:
        for start, size in places:
            _library().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_DONTNEED)

    return let_go


@cache
def _library() -> Any:
    return ctypes.CDLL(None)
