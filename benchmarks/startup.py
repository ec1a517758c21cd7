"""How long until something happens: `luthier --help`, and from the command to the end of the first training step.

    python benchmarks/startup.py [--quick] [--repeats N]

The same model (`mini`), the same 64 short conversations and batches of 8 for each system, each in a fresh process,
interleaved; medians of whole-process times. Trainer and TRL run in the peers' environment (benchmarks/peers/environment.py).
Writes benchmarks/results/startup.json; the last line is the same object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from peers.environment import peer_python

HERE = Path(__file__).parent
WORDS = ("blue", "green", "quick", "slow", "old", "new", "warm", "cold")


def write_rows(path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for at in range(64):
            word = WORDS[at % len(WORDS)]
            turns = [
                {"role": "user", "content": f"Question {at}: what is {word}?"},
                {"role": "assistant", "content": f"Answer {at}: {word} is a word."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def until_our_first_step(command: list[str], environment: dict[str, str]) -> float:
    """Seconds from starting `luthier tune` until its first step stands in the run's events."""
    runs = Path(environment["LUTHIER_RUNS"])
    shutil.rmtree(runs, ignore_errors=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while not any('"event": "step"' in path.read_text() for path in runs.glob("*/events.jsonl")):
        if process.poll() is not None:
            raise SystemExit(f"{command}: ended ({process.returncode}) before its first step")
        time.sleep(0.005)
    taken = time.perf_counter() - started
    process.kill()
    process.wait()
    return taken


def until_first_step(command: list[str], environment: dict[str, str]) -> float:
    """Seconds from starting `command` until it prints a line that begins with FIRST-STEP."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("FIRST-STEP"):
            taken = time.perf_counter() - started
            process.kill()
            process.wait()
            return taken
    raise SystemExit(f"{command[1]}: ended ({process.wait()}) before its first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    luthier = str(Path(sys.executable).with_name("luthier"))
    help_seconds = []
    for _ in range(max(3, repeats)):
        started = time.perf_counter()
        subprocess.run([luthier, "--help"], stdout=subprocess.DEVNULL, check=True)
        help_seconds.append(time.perf_counter() - started)
    systems = ["luthier", "trainer", "trl"]
    found: dict[str, list[float]] = {name: [] for name in systems}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chats.jsonl"
        write_rows(data)
        environment = os.environ | {"LUTHIER_RUNS": f"{folder}/runs", "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true"}
        model = str(files("luthier") / "assets" / "mini")
        for _ in range(repeats):
            found["luthier"].append(
                until_our_first_step(
                    [luthier, "tune", "--model", model, "--data", str(data), "--objective", "sft", "--batch-size", "8",
                     "--steps", "4"],
                    environment,
                )
            )  # fmt: skip
            for name in systems[1:]:
                script = HERE / "peers" / f"first_step_{name}.py"
                found[name].append(until_first_step([peer_python("trl"), str(script), model, str(data)], environment))
    medians = {name: round(statistics.median(values), 2) for name, values in found.items()}
    result = {
        "benchmark": "startup",
        "help_seconds": round(statistics.median(help_seconds), 3),
        "first_step_seconds": medians,
        "repeats": repeats,
        "ours": medians["luthier"],
        "peer": {name: medians[name] for name in systems if name != "luthier"},
        "ratio": {name: round(medians[name] / medians["luthier"], 2) for name in systems if name != "luthier"},
    }
    if not options.quick:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "startup.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
