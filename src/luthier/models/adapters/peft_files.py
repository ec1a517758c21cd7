"""LoRA adapters in the file format of the PEFT library: adapter_config.json and adapter_model.safetensors.

Tensor names are `base_model.model.<layer>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank], the layer named
as in the transformers model (https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from luthier.core.errors import ModelError
from luthier.models.adapters.inject import LoraLinear, linear_layers, lora_layers, replace_layer, shape_of

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
UNSUPPORTED = ("use_dora", "layer_replication", "lora_bias", "trainable_token_indices", "target_parameters")


def read_adapter_config(directory: Path) -> dict[str, Any] | None:
    """The adapter's settings; None where there is no adapter. Raises ModelError for one that is damaged, or a LoRA of a
    kind that cannot be loaded. Adapters of other types are read by `peft_methods`."""
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ModelError(f"{path}: cannot be read as an adapter's settings ({type(err).__name__})") from None
    if settings.get("peft_type") != "LORA":
        return settings  # type: ignore[no-any-return]
    for name in UNSUPPORTED:
        if settings.get(name):
            raise ModelError(f"{path}: {name} is set, which cannot be loaded; merge the adapter with peft first")
    return settings


def attach_adapter(network: Any, directory: Path, settings: dict[str, Any], base: str) -> dict[str, Any]:
    """Put the adapter in `directory` on `network`, and return it as settings of the Part `lora`.

    Raises ModelError when a layer is not there or has another shape: the adapter is for another base.
    """
    path = directory / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        raise ModelError(f"{path}: cannot be read ({type(err).__name__}); the adapter is not whole") from None
    layers = linear_layers(network)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ModelError(
                f"{path}: {key} is no LoRA matrix of a linear layer, and cannot be loaded; merge the adapter with peft first"
            )
        pairs.setdefault(_find(match[1], layers, network, directory, base), {})[match[2]] = tensor.float()
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ModelError(f"{path}: the layer {name} has one matrix of two; the adapter is not whole")
        rank = pair["A"].shape[0]
        outputs, inputs = shape_of(layers[name])
        if pair["A"].shape != (rank, inputs) or pair["B"].shape != (outputs, rank):
            raise ModelError(
                f"{directory}: this adapter is for another base: its layer {name} is {pair['B'].shape[0]} x "
                f"{pair['A'].shape[1]}, and that of {base} is {outputs} x {inputs}"
            )
        alpha = _look_up(settings.get("alpha_pattern"), name, settings["lora_alpha"])
        layer = LoraLinear(
            layers[name],
            rank,
            alpha,
            dropout=float(settings.get("lora_dropout") or 0.0),
            rslora=bool(settings.get("use_rslora")),
        )
        with torch.no_grad():
            layer.lora_a.copy_(pair["A"])
            layer.lora_b.copy_(pair["B"])
        replace_layer(network, name, layer)
    every = set(pairs) == set(layers)
    return {
        "kind": "lora",
        "rank": int(settings["r"]),
        "alpha": float(settings["lora_alpha"]),
        "dropout": float(settings.get("lora_dropout") or 0.0),
        "targets": "all-linear" if every else sorted({name.rpartition(".")[2] for name in pairs}),
        "rslora": bool(settings.get("use_rslora")),
    }


def write_adapter(loaded: LoadedModel, directory: Path) -> None:
    """Write the adapter of `loaded` so that peft loads it on the same base with the same outputs."""
    network = loaded.network
    held = dict(lora_layers(network))
    tensors = {}
    for name, layer in held.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b.detach().cpu().contiguous()
    rank = Counter(layer.rank for layer in held.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in held.values()).most_common(1)[0][0]
    first = next(iter(held.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(loaded.spec.task, "FEATURE_EXTRACTION"),
        "base_model_name_or_path": loaded.spec.base,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "target_modules": _targets(network, set(held)),
        "rank_pattern": {name: layer.rank for name, layer in held.items() if layer.rank != rank},
        "alpha_pattern": {name: _whole(layer.alpha) for name, layer in held.items() if layer.alpha != alpha},
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in held.values()),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _find(stated: str, layers: dict[str, Any], network: Any, directory: Path, base: str) -> str:
    """The layer's name in this network: with or without the body's prefix, as it was trained for another task."""
    prefix = network.base_model_prefix + "."
    for name in (stated, stated.removeprefix(prefix), prefix + stated):
        if name in layers:
            return name
    raise ModelError(f"{directory}: this adapter is for another base: {base} has no linear layer {stated}")


def _look_up(patterns: dict[str, Any] | None, name: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf".*\.{pattern}$", "." + name):
            return float(value)
    return float(default)


def _targets(network: Any, chosen: set[str]) -> list[str] | str:
    """The last parts of the names where they say it exactly, else a regular expression of the whole names."""
    leaves = sorted({name.rpartition(".")[2] for name in chosen})
    linear = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    names = {name.removesuffix(".base") for name in linear}
    if {name for name in names if name.rpartition(".")[2] in leaves} == chosen:
        return leaves
    return "|".join(re.escape(name) for name in sorted(chosen))


def _whole(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number
