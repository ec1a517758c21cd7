"""Luthier's side of benchmarks/tuning.py: tune on the rows, and print one JSON line."""

import json
import sys
import time

from luthier.core.config import resolve
from luthier.core.events import Event
from luthier.verbs.tune import Tune, tune

options = json.loads(sys.argv[1])
seen: list[tuple[float, int, float]] = []


def note(event: Event) -> None:
    if event["event"] == "step":
        seen.append((time.perf_counter(), event["tokens"], event["loss"]))
        if len(seen) == options["steps"]:
            import resource

            steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(seen[options["warm"] - 1 :], seen[options["warm"] :])]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps({"steps": steps, "losses": [one[2] for one in seen], "peak_bytes": peak}), flush=True)
            raise SystemExit(0)


tune(
    resolve(
        Tune,
        values={
            "model": options["model"],
            "data": {"train": options["data"], "split": {"validation": 0}},
            "objective": "sft",
            "adapter": {"kind": "lora", "rank": 16, "alpha": 32} if options["method"] == "lora" else "full",
            "batch_size": options["batch_size"],
            "steps": options["steps"] + 1,
            "learning_rate": 1e-4,
            "schedule": {"kind": "constant", "warmup": 0},
            "by_length": False,
            "baselines": False,
        },
    ),
    sinks=[note],
)
