"""The record of a run: what was asked, what came out, on what, in how long. One JSON file, written whole or not at all."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import Field

from luthier.core.config import Config
from luthier.core.types import Estimate


class Record(Config):
    """Everything worth keeping of one run, as `record.json` holds it."""

    id: str
    """The run's name, and its directory's."""
    verb: str
    """What was done: tune, evaluate, generate ..."""
    state: Literal["running", "finished", "interrupted", "failed"] = "running"
    """How far it came. An interrupted run can be resumed."""
    created: str = ""
    """Start, ISO 8601, UTC."""
    seconds: float = 0.0
    """Wall-clock time, summed over resumptions."""
    metrics: dict[str, Estimate] = Field(default_factory=dict)
    """Results with their error bars."""
    baselines: dict[str, dict[str, Estimate]] = Field(default_factory=dict)
    """The same metrics for each plain baseline on the same items."""
    numbers: dict[str, Any] = Field(default_factory=dict)
    """Single figures of the run: steps, tokens, tokens per second, best step ..."""
    choices: dict[str, str] = Field(default_factory=dict)
    """What was chosen for the user and why, one sentence each."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Fingerprint, rows, splits and profile of the data."""
    lineage: dict[str, str] = Field(default_factory=dict)
    """What this was made from: model, data, adapter, parent run."""
    artefacts: dict[str, str] = Field(default_factory=dict)
    """Name to path, relative to the run directory."""
    warnings: dict[str, int] = Field(default_factory=dict)
    """Each warning's sentence and how often it was raised."""
    error: str | None = None
    """The sentence the run failed with."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of Python and of the packages that decide a result."""
    machine: dict[str, Any] = Field(default_factory=dict)
    """Processor, cores, memory and accelerator."""
    peak_memory_bytes: int | None = None
    """Largest resident size of the process."""


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; a package that is absent is left out."""
    found = {"python": platform.python_version()}
    for package in ("luthier", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores and memory in bytes (None where the system does not tell)."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    try:
        memory: int | None = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    return {"system": platform.system(), "processor": _processor(), "cores": cores, "memory_bytes": memory}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure_peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def now() -> str:
    """The present moment, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
