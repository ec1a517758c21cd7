"""OpenVINO GenAI's continuous batching on the requests of benchmarks/writing.py, in FP16, INT8 and INT4; runs in the
peer's environment.

One JSON argument as for writing_llama.py. The model is exported by optimum-intel as its documentation does it. Token
ids go in, greedy, end tokens ignored, exact lengths. Prints JSON: for each form many, alone and prefill in tokens a
second (medians after one that warms up), peak_gb.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

FORMS = {"FP16": "fp16", "INT8": "int8", "INT4": "int4"}


def export(model: Path, to: Path, form: str) -> None:
    tool = Path(sys.executable).parent / "optimum-cli"
    # Groups of 128, its default, where they fit into every row.
    config = json.loads((model / "config.json").read_text())
    groups = next(
        size for size in (128, 64, 32) if config["hidden_size"] % size == config["intermediate_size"] % size == 0
    )
    command = [str(tool), "export", "openvino", "--model", str(model), "--task", "text-generation-with-past",
               "--weight-format", form, str(to)]  # fmt: skip
    if form == "int4":
        command += ["--group-size", str(groups)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def write(pipe: Any, asked: list[tuple[list[int], int]]) -> float:
    """Seconds for all."""
    configs = []
    for _, room in asked:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.min_new_tokens, config.ignore_eos, config.do_sample = room, room, True, False
        configs.append(config)
    prompts = [openvino.Tensor(np.asarray([prompt], dtype=np.int64)) for prompt, _ in asked]
    started = time.perf_counter()
    found = pipe.generate(prompts, configs)
    spent = time.perf_counter() - started
    lengths = [len(one.m_generation_ids[0]) for one in found]
    assert lengths == [room for _, room in asked], lengths
    return spent


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    asked = [(list(prompt), int(room)) for prompt, room in options["asked"]]
    ids = [token for prompt, _ in asked for token in prompt]
    alone, first, long = [(ids[:128], 128)], [(ids[:128], 1)], [(ids[:1024], 1)]
    wanted = sum(room for _, room in asked)
    found: dict[str, Any] = {"version": genai.__version__}
    for form, weights in FORMS.items():
        path = Path(options["folder"]) / f"{Path(options['model']).name}-openvino-{weights}"
        if not (path / "openvino_model.xml").exists():
            export(Path(options["model"]), path, weights)
        settings = genai.SchedulerConfig()
        settings.cache_size, settings.max_num_seqs, settings.max_num_batched_tokens = 2, 64, 1024
        settings.enable_prefix_caching = False
        threads = {"INFERENCE_NUM_THREADS": options["threads"], "PERFORMANCE_HINT": "LATENCY"}
        pipe = genai.ContinuousBatchingPipeline(str(path), settings, "CPU", threads)
        rates: dict[str, list[float]] = {"many": [], "alone": [], "prefill": []}
        for at in range(options["repeats"] + 1):
            made = {
                "many": wanted / write(pipe, asked),
                "alone": 127 / (write(pipe, alone) - write(pipe, first)),
                "prefill": 1024 / write(pipe, long),
            }
            if at:
                for name, one in made.items():
                    rates[name].append(one)
        found[form] = {name: round(statistics.median(one), 1) for name, one in rates.items()}
        print(form, found[form], file=sys.stderr, flush=True)
        del pipe
    found["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
