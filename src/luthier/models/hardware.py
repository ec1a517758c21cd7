"""What this machine computes with."""

from __future__ import annotations

from typing import TypedDict

import torch


class Device(TypedDict):
    """A CUDA device."""

    name: str
    memory_bytes: int
    capability: str
    dtypes: list[str]


class Hardware(TypedDict):
    """What a machine computes with, as plain values."""

    torch: str
    threads: int
    instruction_set: str
    cpu_dtypes: list[str]
    bfloat16_is_fast: bool
    mkldnn: bool
    cuda: list[Device]
    mps: bool


def describe_hardware() -> Hardware:
    """Threads, instruction set and fast precisions of the processor; name, memory and precisions of each CUDA device."""
    devices: list[Device] = []
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
    mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction_set": isa,
        "cpu_dtypes": ["float32", "bfloat16"],
        "bfloat16_is_fast": mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "mkldnn": mkldnn,
        "cuda": devices,
        "mps": torch.backends.mps.is_available(),
    }
