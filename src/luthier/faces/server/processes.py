"""Processes that outlive whoever started them: whether one still lives, and is still the same."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


def born(pid: int) -> str | None:
    """When a process started, in the system's own words; None where it runs no more. A number is given again to other
    processes, with another start."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _ask_ps(pid)
    except ProcessLookupError:
        return None
    # The name of the program stands in brackets, and may hold anything.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _ask_ps(pid: int) -> str | None:
    done = subprocess.run(["ps", "-o", "state=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, start = done.stdout.strip().partition(" ")
    return None if not start or state.startswith("Z") else start.strip()


def tell(pid: int, number: signal.Signals) -> None:
    """Send a signal, to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
