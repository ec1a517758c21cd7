"""From the command to the first token, cold: `luthier generate` for one token, beside transformers' `generate` and llama.cpp.

    python benchmarks/cold.py [--quick] [--shape 15m|135m|0.6b] [--repeats N] [--peers llama]

A model of a known shape with random weights in bf16 on the disk (for llama.cpp the same weights as a file of its own, made
in the first round), one prompt, one token, each in a process of its own, in turn; medians of the repeats, after one round
that warms the disk's cache. Seconds are of the whole process, memory is the most that was resident in it, the mapped pages of
files with it. Ours is the command as people run it, with what it chooses by itself (weights packed in int8). The first loading
of a model measures them against the model's own and keeps what it found, as llama.cpp's file is made once; it is told apart
(`ours_first`: nothing kept, kernels compiled before). `interpreter` is what any torch program takes: a Python that imports
torch and tokenizers, and ends. Writes benchmarks/results/cold.json; the last line printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from peers.environment import ROOT, peer_python
from shapes import make_model

from luthier.models.elsewhere import load_elsewhere
from luthier.native.build import library_path, load_library

HERE = Path(__file__).parent
PROMPT = "The quick brown fox"
# Starts a command and tells, when it ends, how long that took and the most that was resident in it.
WATCH = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
taken = time.perf_counter() - started
print(json.dumps([code, taken, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""


def watch(command: list[str]) -> tuple[float, float]:
    """Seconds and bytes."""
    done = subprocess.run([sys.executable, "-c", WATCH, *command], stdout=subprocess.PIPE, text=True, check=True)
    code, seconds, size = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{command} failed")
    return seconds, size


def commands(path: Path, peers: list[str]) -> dict[str, list[str]]:
    """What is run, by name."""
    luthier = [sys.executable, "-c", "from luthier.faces.cli.main import main; raise SystemExit(main())"]
    found = {
        "ours": [*luthier, "generate", str(path), PROMPT, "--max-tokens", "1"],
        "interpreter": [sys.executable, "-c", "import torch, tokenizers"],
        "transformers": [sys.executable, str(HERE / "peers" / "cold_transformers.py"), str(path), PROMPT],
    }
    if "llama" in peers:
        ids = load_elsewhere(str(path)).renderer.prompt(PROMPT)
        script, file = HERE / "peers" / "cold_llama.py", path.with_name(f"{path.name}-Q8_0.gguf")
        found["llama"] = [peer_python("llama"), str(script), str(path), str(file), json.dumps(ids)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 15m shape, one repeat, no other peers")
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", default="llama", help="beside transformers")
    options = parser.parse_args()
    shape, repeats = ("15m", 1) if options.quick else (options.shape, options.repeats)
    build = ROOT / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    peers = [] if options.quick else [name for name in options.peers.split(",") if name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    # What earlier runs kept of this model is not known here; the kernels are compiled before anything is watched.
    kept = tempfile.TemporaryDirectory()
    for library in ("kernels", "decoder"):
        load_library(library)
        os.symlink(library_path(library), Path(kept.name) / library_path(library).name)
    os.environ["LUTHIER_CACHE"] = kept.name
    systems = commands(make_model(shape, build), peers)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    first = (0.0, 0.0)
    for at in range(repeats + 1):
        for name, command in systems.items():
            one = watch(command)
            if name == "ours" and not at:
                first = one
            print(name, f"{one[0]:.2f} s {one[1] / 1e9:.3f} GB", file=sys.stderr, flush=True)
            if at:
                found[name].append(one)
    medians = {
        name: {
            "seconds": round(statistics.median(one[0] for one in many), 2),
            "peak_gb": round(statistics.median(one[1] for one in many) / 1e9, 3),
        }
        for name, many in found.items()
    }
    ours, interpreter = medians.pop("ours"), medians.pop("interpreter")
    result = {
        "benchmark": "cold",
        "shape": shape,
        "repeats": repeats,
        "peer_is": "one prompt, one token, a process of its own: transformers' generate in bf16; llama.cpp in its best form",
        "ours": ours,
        "ours_first": {"seconds": round(first[0], 2), "peak_gb": round(first[1] / 1e9, 3)},
        "interpreter": interpreter,
        "peer": medians,
        "ratio": {
            name: {
                "faster": round(one["seconds"] / ours["seconds"], 2),
                "less_memory": round(one["peak_gb"] / ours["peak_gb"], 2),
            }
            for name, one in medians.items()
        },
    }
    if not options.quick:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "cold.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
