"""Luthier's side of benchmarks/preference.py: DPO on the pairs, and print one JSON line."""

import json
import sys
import time

from luthier.core.config import resolve
from luthier.core.events import Event
from luthier.verbs.tune import Tune, tune

options = json.loads(sys.argv[1])
seen: list[tuple[float, int, float]] = []
reference = [0.0, 0.0]


def note(event: Event) -> None:
    now = time.perf_counter()
    if event["event"] == "stage":
        # The last stage before the first sign of the reference is its own.
        if not reference[1]:
            reference[0] = now
    elif event["event"] == "progress" and event["name"] == "reference":
        reference[1] = now
    elif event["event"] == "step":
        seen.append((now, event["tokens"], event["loss"]))
        if len(seen) == options["steps"]:
            import resource

            warm = options["warm"]
            steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(seen[warm - 1 :], seen[warm:])]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            spent = reference[1] - reference[0]
            print(
                json.dumps(
                    {
                        "steps": steps,
                        "reference": spent,
                        "referred": options["pairs"],
                        "losses": [one[2] for one in seen],
                        "peak_bytes": peak,
                    }
                ),
                flush=True,
            )
            raise SystemExit(0)


tune(
    resolve(
        Tune,
        values={
            "model": options["model"],
            "data": {"train": options["data"], "split": {"validation": 0}},
            "objective": "dpo",
            "adapter": {"kind": "lora", "rank": 16, "alpha": 32},
            "batch_size": options["batch_size"],
            "epochs": 1,
            "learning_rate": 1e-4,
            "schedule": {"kind": "constant", "warmup": 0},
            "by_length": False,
            "baselines": False,
            "seed": 0,
        },
    ),
    sinks=[note],
)
