"""The scripts of examples/cluster, on one machine: two torchruns as two machines, and Slurm's commands played by stubs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier.core.events import read_events
from luthier.core.run import read_record

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "cluster"
STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$STUBS/said"; fi',
    # In the background of the script, as Slurm's is; its number is kept for scancel.
    "srun": 'shift; "$@" & echo $! > "$STUBS/step"; wait $!',
    "scancel": 'kill -TERM "$(cat "$STUBS/step")"',
}

pytestmark = pytest.mark.e2e


@pytest.fixture
def environment(tmp_path):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    source = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    places = {"LUTHIER_RUNS": str(tmp_path / "runs"), "LUTHIER_CACHE": str(tmp_path / "cache"), "STUBS": str(tmp_path)}
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "one",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "PYTHONPATH": source, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PROCESSES": "2"}
    return {**os.environ, **places, **job, **more}


def steps(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "step"]


def test_slurm_stops_before_its_time_and_goes_on(environment, tmp_path):
    run, command = tmp_path / "runs" / "job-7", [str(SCRIPTS / "slurm.sh")]
    environment["PORT"] = "29617"
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    until = time.monotonic() + 200
    while not (run / "events.jsonl").is_file() or not steps(run):
        assert job.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text(encoding="utf-8")
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=100) == 0, (tmp_path / "log").read_text(encoding="utf-8")
    assert read_record(run).state == "interrupted"
    assert (tmp_path / "said").read_text(encoding="utf-8") == "requeue 7\n"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert read_record(run).state == "finished" and len(steps(run)) == 60


def test_two_machines(environment, tmp_path):
    more = ["examples/cluster/run.yaml", "--name", "two", "--steps", "6"]
    environment |= {"NODES": "2", "PROCESSES": "1", "PORT": "29618"}
    command = [str(SCRIPTS / "torchrun.sh"), *more]
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=300)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    alone = [sys.executable, "-m", "luthier", "tune", *more[:2], "one", *more[3:]]
    subprocess.run(alone, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    assert steps(tmp_path / "runs" / "two") == pytest.approx(steps(tmp_path / "runs" / "one"), rel=1e-5)
