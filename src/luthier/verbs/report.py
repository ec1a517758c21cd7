"""Write a run's page anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.core.config import Config, Resolved, resolve
from luthier.core.events import Events, Sink
from luthier.core.run import find_run


class Report(Config):
    """Which run to report on."""

    run: str
    """run:<id>, run:last, or the run's directory."""


def report(asked: Resolved[Report] | Report | None = None, *, sinks: Sequence[Sink] = (), **settings: Any) -> Path:
    """Write `report.html` into the run's directory from what is there, and return its path. Raises RunError."""
    from luthier.reporting.page import write_report

    config = asked if isinstance(asked, Report) else (asked or resolve(Report, values=settings)).config
    Events(sinks=sinks).stage(f"writing the report of {config.run}")
    return write_report(find_run(config.run))
