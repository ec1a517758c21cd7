"""Keep freed memory in the process: large temporaries otherwise go back to the kernel at every step."""

from __future__ import annotations

import ctypes
import platform

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from the heap and not to trim it; False where there is no glibc.

    On the CPU a training step allocates and frees the same hundreds of megabytes again and again; each return to the
    kernel costs page faults at the next step. The price is that memory stays with the process until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 128 * 2**20))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
