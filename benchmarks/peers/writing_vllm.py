"""vLLM's CPU build on the requests of benchmarks/writing.py, in bf16; runs in the peer's environment.

One JSON argument as for writing_llama.py. Settings are those of its documentation for processors: a core to each thread,
space for keys and values in gigabytes, Intel's OpenMP library before any other, graphs compiled (its default). Token ids
go in, greedy, end tokens ignored, exact lengths. Prints JSON: for each form many, alone and prefill in tokens a second
(medians after one that warms up), peak_gb.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

LIBRARY = Path(sys.prefix) / "lib" / "libiomp5.so"


def write(llm: Any, asked: list[tuple[list[int], int]]) -> float:
    """Seconds for all."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    ways = [SamplingParams(temperature=0, max_tokens=room, ignore_eos=True, detokenize=False) for _, room in asked]
    started = time.perf_counter()
    found = llm.generate(prompts, ways, use_tqdm=False)
    spent = time.perf_counter() - started
    lengths = [len(one.outputs[0].token_ids) for one in found]
    assert lengths == [room for _, room in asked], lengths
    return spent


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    if LIBRARY.exists() and "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": str(LIBRARY)})
    threads = int(options["threads"])
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
                   "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": str(threads)}  # fmt: skip
    stdout, sys.stdout = sys.stdout, sys.stderr
    import vllm

    asked = [(list(prompt), int(room)) for prompt, room in options["asked"]]
    ids = [token for prompt, _ in asked for token in prompt]
    alone, first, long = [(ids[:128], 128)], [(ids[:128], 1)], [(ids[:1024], 1)]
    wanted = sum(room for _, room in asked)
    llm = vllm.LLM(
        options["model"],
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )
    rates: dict[str, list[float]] = {"many": [], "alone": [], "prefill": []}
    for at in range(options["repeats"] + 1):
        made = {
            "many": wanted / write(llm, asked),
            "alone": 127 / (write(llm, alone) - write(llm, first)),
            "prefill": 1024 / write(llm, long),
        }
        if at:
            for name, one in made.items():
                rates[name].append(one)
    form = {name: round(statistics.median(one), 1) for name, one in rates.items()}
    print("BF16", form, file=sys.stderr, flush=True)
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    print(json.dumps({"version": vllm.__version__, "BF16": form, "peak_gb": peak}), file=stdout)


if __name__ == "__main__":
    main()
