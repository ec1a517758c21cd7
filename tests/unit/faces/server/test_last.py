"""A server of run:last goes on with the run that it began with."""

import json
import os
import signal
from pathlib import Path

import httpx
import torch

from luthier.models.load import load_model
from luthier.models.save import save_model
from running import Running


def tuned(runs: Path, name: str, seed: int) -> None:
    """A run of this name that holds a model, made to write something of its own."""
    torch.manual_seed(seed)
    model = load_model("mini")
    with torch.no_grad():
        for weight in model.network.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    save_model(model, runs / name / "artefacts" / "model")
    (runs / name / "record.json").write_text(json.dumps({"id": name, "verb": "tune", "created": f"2026-01-0{seed}"}))


def test_an_engine_that_starts_again_loads_the_run_that_it_was(tmp_path):
    tuned(tmp_path, "first", 1)
    running = Running("it=run:last", runs=tmp_path)

    def say(model):
        asked = {"model": model, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
        return httpx.post(f"{running.url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"]

    try:
        before = say("it")
        tuned(tmp_path, "second", 2)
        (engine,) = running.engines()
        os.kill(engine, signal.SIGKILL)
        running.alive_until(lambda: running.engines() not in ([], [engine]))
        running.ready()
        assert say("it") == before
        # Whoever says run:last now means the second one.
        made = httpx.post(f"{running.url}/admin/models", json={"source": "run:last", "name": "new"}, timeout=60).json()
        assert made["root"].endswith("second") and say("new") != before
    finally:
        assert running.stop() == 0
