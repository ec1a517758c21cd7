"""How much memory a process holds, held at most, and may still have: on the CPU what is resident, on a GPU what torch
allocated."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

import torch

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
# What libraries on the CPU come to keep beside what is in use: buffers of threads, and for bfloat16 code for the shapes of
# products, which tears the heap apart (both as benchmarks/memory.py shows them).
LIBRARIES, CODE = 64 * 10**6, 120 * 10**6
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Where a container's limit and use stand: version 2 of control groups, and version 1.
GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from the heap and not to trim it; False where there is no glibc.

    On the CPU a training step allocates and frees the same hundreds of megabytes again and again; each return to the
    kernel costs page faults at the next step. The price is that memory stays with the process until it ends, or until
    `return_freed_memory`.

    oneDNN and its caller in torch keep the code that they made for every shape of a product, some 0.3 MB each, up to 1,024
    of each; every step has other shapes. Where nobody said otherwise they keep the last 128: a step has half as many.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
    libc = _glibc()
    if libc is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 128 * 2**20))
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)


def return_freed_memory(device: torch.device) -> None:
    """Give back what was freed and is kept for reuse.

    A block of glibc's is asked for with room for its alignment, so one that was freed is often just too small for the
    next of its size, and the heap grows from step to step beyond what is in use; without this it never shrinks.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds on `device` now."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else _status("VmRSS")


def start_peak(device: torch.device) -> bool:
    """Begin to watch for the most that is held; False where the system cannot, and peaks are those of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Most bytes held on `device` since `start_peak`."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _status("VmHWM")


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on `device`, within its container's limit; None where nobody knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    found = [_field(Path("/proc/meminfo"), "MemAvailable")]
    for limit, used, stat, cached in GROUPS:
        most, now = _number(Path(limit)), _number(Path(used))
        if most is not None and now is not None:
            # Pages of files that can be dropped count as used.
            found.append(max(0, most - now + (_plain(Path(stat), cached) or 0)))
    known = [one for one in found if one is not None]
    return min(known) if known else None


def library_memory(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that libraries come to hold on `device` once a model computes in `dtype`."""
    if device.type != "cpu":
        return 0
    return LIBRARIES + (CODE if dtype == torch.bfloat16 else 0)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def shown(size: float) -> str:
    """Bytes for people: 2.41 GB, 310 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _status(name: str) -> int:
    found = _field(STATUS, name)
    if found is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows does not tell
        return 0
    # Not Linux: the most that was ever resident, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _field(path: Path, name: str) -> int | None:
    """A line such as `VmRSS:  123 kB`, in bytes."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _plain(path: Path, name: str) -> int | None:
    """A line such as `inactive_file 123`."""
    try:
        for line in path.read_text().splitlines():
            if line.split()[0] == name:
                return int(line.split()[1])
    except OSError:
        pass
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # there is none, or it says "max"
        return None
