"""Progress for people: a live bar on a terminal, a line now and then when piped. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from luthier.core.events import Event, Sink
from luthier.faces.cli.chinese import say

# Seconds between lines when nobody watches.
QUIET_EVERY = 15.0


@contextmanager
def show_progress(quiet: bool = False) -> Iterator[list[Sink]]:
    """Sinks for a verb; what they show is cleared away at the end."""
    if quiet:
        yield []
    elif sys.stderr.isatty():
        with _live() as sink:
            yield [sink]
    else:
        yield [_Lines()]


@contextmanager
def _live() -> Iterator[Sink]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None, note="")

        def sink(event: Event) -> None:
            kind = event["event"]
            if kind == "stage":
                bars.update(task, description=say(event["name"]), completed=0, total=None, note="")
            elif kind == "step":
                speed, left = f"{event['tokens_per_second']:,.0f}", say_time(event["seconds_left"])
                note = say(f"loss {event['loss']:.4f} · {speed} tokens/s · {left} left") + say_tally(event)
                bars.update(task, description=say("tuning"), completed=event["step"], total=event["steps"], note=note)
            elif kind == "progress":
                name = say(event["name"])
                bars.update(task, description=name, completed=event["done"], total=event["total"], note="")
            else:
                line = describe(event)
                if line:
                    bars.console.print(line, highlight=False, markup=False)

        yield sink


class _Lines:
    """Plain lines for pipes and logs."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "step":
            first_or_last = event["step"] in (1, event["steps"])
            if not first_or_last and time.monotonic() - self.last < QUIET_EVERY:
                return
            self.last = time.monotonic()
            line: str | None = say(
                f"step {event['step']}/{event['steps']}  loss {event['loss']:.4f}  "
                f"{event['tokens_per_second']:,.0f} tokens/s  {say_time(event['seconds_left'])} left"
            ) + say_tally(event)
        elif kind == "stage":
            line = f"{say(event['name'])} ..."
        else:
            line = describe(event)
        if line:
            print(line, file=sys.stderr, flush=True)


def describe(event: Event) -> str | None:
    """One event as a line in the reader's language, None for those that are not worth one."""
    kind = event["event"]
    if kind == "validate":
        skipped = {"event", "time", "step", "best", "judged_by"}
        values = "  ".join(f"{name} {value:.4f}" for name, value in event.items() if name not in skipped)
        return say(f"step {event['step']}: validation {values}{'  (best so far)' if event['best'] else ''}")
    if kind == "warning":
        count = event["count"]
        return say(f"warning: {count} x {event['message']}" if count > 1 else f"warning: {event['message']}")
    if kind == "choice":
        return say(f"{event['name']}: {event['value']} ({event['why']})")
    return None


def say_tally(event: Event) -> str:
    """What the objective counted in a step, by name, after the rest of its line."""
    return "".join(f"  {name} {value:.3g}" for name, value in event.get("tally", {}).items())


def say_time(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    if whole < 90:
        return say(f"{whole} s")
    return say(f"{whole // 60} min" if whole < 5400 else f"{whole / 3600:.1f} h")
