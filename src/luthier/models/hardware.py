"""What this machine computes with."""

from __future__ import annotations

from typing import Any

import torch


def describe_hardware() -> dict[str, Any]:
    """Threads, instruction set and fast precisions of the processor; name, memory and precisions of each CUDA device."""
    devices = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": card.name,
                "memory_bytes": card.total_memory,
                "capability": f"{card.major}.{card.minor}",
                "dtypes": ["float32", "float16", *(["bfloat16"] if card.major >= 8 else [])],
            }
        )
    isa = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction_set": isa,
        "cpu_dtypes": ["float32", "bfloat16"],
        "bfloat16_is_fast": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        if torch.backends.mkldnn.is_available()
        else False,
        "mkldnn": torch.backends.mkldnn.is_available(),
        "cuda": devices,
        "mps": torch.backends.mps.is_available(),
    }
