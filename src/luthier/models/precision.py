"""In which precision a model computes while it is tuned: chosen for the machine, and said."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch

from luthier.models.quantised.network import quantised_layers
from luthier.models.spec import LoadedModel

Precision: TypeAlias = Literal["float32", "bfloat16"]
# Models smaller than this stay in fp32: their products are too small to gain much, and rounding is felt more.
SMALL_FROZEN, SMALL_WHOLE = 10_000_000, 50_000_000


def choose_precision(device: torch.device, *, frozen_base: bool, parameters: int) -> tuple[Precision, str]:
    """A precision and the reason: bfloat16 where the machine multiplies it fast and the model is not small."""
    if not is_fast(device):
        return "float32", "this machine does not multiply bfloat16 fast"
    if parameters < (SMALL_FROZEN if frozen_base else SMALL_WHOLE):
        return "float32", f"a model of {parameters / 1e6:.1f} M parameters gains little from bfloat16"
    if frozen_base:
        return "bfloat16", "the base is frozen and this machine multiplies bfloat16 fast; what learns is kept in fp32"
    return "bfloat16", "this machine multiplies bfloat16 fast; what learns has fp32 masters"


def is_fast(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products (AVX512-BF16 or AMX; compute capability 8)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in asked if hasattr(torch.cpu, name))


def cast_weights(model: LoadedModel, precision: Precision) -> None:
    """Bring the network's weights to `precision`, in place, and say so in its spec."""
    cast_network(model.network, getattr(torch, precision))
    model.spec = model.spec.model_copy(update={"precision": precision})


@torch.no_grad()
def cast_network(network: Any, dtype: torch.dtype) -> None:
    """Bring all weights to `dtype`, in place, but for matrices of an adapter, which learn in fp32, and quantised weights,
    which are rebuilt in it. Buffers (the frequencies of rotary positions) stay as they are."""
    for name, parameter in network.named_parameters():
        learned = name.rpartition(".")[2].startswith("lora_") or vars(parameter).get("added")
        if parameter.is_floating_point() and not learned:
            parameter.data = parameter.data.to(dtype)
    for _, layer in quantised_layers(network):
        layer.dtype = dtype
    network.config.dtype = dtype
