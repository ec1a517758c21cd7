"""The C kernels of a layer beside the same in torch, forward, and adapters of layers that read the same beside each alone,
forward and backward; in bf16.

    python benchmarks/kernels.py [--quick]

1,000 tokens of the 135M shape; the two in turn, medians of 20 (5 with --quick). Writes benchmarks/results/kernels.json; the
last line printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F

from luthier.models.adapters.product import Factors, low_rank_products
from luthier.native.layers import RMSNorm, Rotate, SwiGLU, cross_entropy_, naive_cross_entropy_, naive_rotate

Work: TypeAlias = Callable[[], object]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def projections(outputs: Sequence[int], tokens: int = 1000, width: int = 576) -> tuple[Work, Work]:
    """Frozen layers from `width` to `outputs` with LoRA of rank 16: (in one function, each in its own)."""
    x_NI = torch.randn(tokens, width).bfloat16().requires_grad_()
    layers = [
        Factors(
            torch.randn(o, width).bfloat16(),
            None,
            *(torch.randn(s).requires_grad_() for s in ((16, width), (o, 16))),
            2.0,
        )
        for o in outputs
    ]
    grads = [torch.randn(tokens, o).bfloat16() for o in outputs]
    learned = [x_NI, *(one for layer in layers for one in (layer.a_RI, layer.b_OR))]
    together = lambda: torch.autograd.grad(low_rank_products(x_NI, layers), learned, grads)  # noqa: E731
    alone = lambda: torch.autograd.grad([low_rank_products(x_NI, [one])[0] for one in layers], learned, grads)  # noqa: E731
    return together, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    repeats = 5 if parser.parse_args().quick else 20

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).bfloat16()

    x, weight, gate, up = made(1000, 576), made(576), made(1000, 1536), made(1000, 1536)
    heads, turn = made(1000, 9, 64), made(1000, 64)
    logits, target, ones = made(128, 49152), torch.randint(0, 49152, (128,)), torch.ones(128)
    questions = {
        "rms_norm": (lambda: RMSNorm.apply(x, weight, 1e-5, 0.0), lambda: F.rms_norm(x, (576,), weight, 1e-5)),
        "swiglu": (lambda: SwiGLU.apply(gate, up), lambda: F.silu(gate) * up),
        "rotate": (lambda: Rotate.apply(heads, turn, turn), lambda: naive_rotate(heads, turn, turn)),
        "cross_entropy": (
            lambda: cross_entropy_(logits.clone(), target, ones),
            lambda: naive_cross_entropy_(logits.clone(), target, ones),
        ),
    }
    questions["adapters_qkv"] = projections((576, 192, 192))
    questions["adapters_gate_up"] = projections((1536, 1536))
    ours, peer = {}, {}
    for name, pair in questions.items():
        found = [[seconds(work) * 1e3 for work in pair] for _ in range(repeats + 2)][2:]
        ours[name], peer[name] = (round(statistics.median(one[at] for one in found), 3) for at in (0, 1))
    result = {
        "benchmark": "kernels",
        "unit": "ms",
        "threads": torch.get_num_threads(),
        "ours": ours,
        "peer": peer,
        "ratio": {name: round(peer[name] / ours[name], 2) for name in ours},
    }
    if repeats == 20:
        path = Path(__file__).parent / "results" / "kernels.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
