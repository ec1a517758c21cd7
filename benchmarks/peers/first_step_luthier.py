"""Luthier's own way to the first step, as the command line goes it."""

import sys

from luthier.core.config import resolve
from luthier.core.events import Event
from luthier.verbs.tune import Tune, tune


def note(event: Event) -> None:
    if event["event"] == "step":
        print("FIRST-STEP", flush=True)


settings = {"model": sys.argv[1], "data": sys.argv[2], "objective": "sft", "batch_size": 8, "steps": 4}
tune(resolve(Tune, values=settings), sinks=[note])
