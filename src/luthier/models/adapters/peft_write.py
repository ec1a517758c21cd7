"""Adapters in the file format of the PEFT library, written (see peft_files.py for what is where)."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.models.adapters.inject import LoraEmbedding, LoraLayer, also_modules, edge_layers, lora_layers, sharers
from luthier.models.adapters.magnitude import DoraLinear
from luthier.models.adapters.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX
from luthier.models.adapters.principal import PissaLinear
from luthier.models.adapters.tokens import token_layers

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel

TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


def write_adapter(loaded: LoadedModel, directory: Path) -> None:
    """Write the adapter of `loaded` so that peft loads it on the same base with the same outputs.

    Where tokens were added, the base's vocabulary has to be resized to the tokenizer beside the adapter before.
    """
    network, adapter = loaded.network, loaded.spec.adapter or {}
    held = dict(lora_layers(network))
    tensors: dict[str, Tensor] = {}
    for name, layer in held.items():
        tensors |= {f"{name}.{part}": one for part, one in _tensors(layer).items()}
    indices = _rows(network, tensors)
    whole, tied = _whole(network, adapter.get("also", []), tensors)
    scales = {name: _rank_and_alpha(layer) for name, layer in held.items()}
    rank, alpha = (Counter(pair[at] for pair in scales.values()).most_common(1)[0][0] for at in (0, 1))
    first = next(iter(held.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(loaded.spec.task, "FEATURE_EXTRACTION"),
        "base_model_name_or_path": loaded.spec.base,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "use_dora": isinstance(first, DoraLinear),
        "target_modules": _targets(network, set(held)),
        "rank_pattern": {name: one for name, (one, _) in scales.items() if one != rank},
        "alpha_pattern": {name: _plain(one) for name, (_, one) in scales.items() if one != alpha},
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in held.values()),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": whole or None,
        "trainable_token_indices": indices or None,
        "ensure_weight_tying": tied,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    kept = {PREFIX + name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    save_file(kept, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _tensors(layer: LoraLayer) -> dict[str, Tensor]:
    """What a layer learned, by PEFT's names."""
    found: dict[str, Tensor] = {}
    if isinstance(layer, LoraEmbedding):
        found |= {"lora_embedding_A": layer.lora_a, "lora_embedding_B": layer.lora_b}
    else:
        a_RI, b_OR = layer.difference() if isinstance(layer, PissaLinear) else (layer.lora_a, layer.lora_b)
        found |= {"lora_A.weight": a_RI, "lora_B.weight": b_OR}
    if isinstance(layer, DoraLinear):
        found["lora_magnitude_vector"] = layer.lora_magnitude
    if layer.keeps_base:
        found["base_layer.weight"] = layer.weight
    return found


def _rank_and_alpha(layer: LoraLayer) -> tuple[int, float]:
    """As they are in the files: of twice the rank where what was learned is a difference, at the same scale."""
    if not isinstance(layer, PissaLinear):
        return layer.rank, layer.alpha
    return 2 * layer.rank, layer.alpha * (2**0.5 if layer.rslora else 2)


def _rows(network: Any, tensors: dict[str, Tensor]) -> list[int] | dict[str, list[int]]:
    """Put learned rows into `tensors`, once for layers that share them; returns which rows of which layers they are."""
    found: dict[str, list[int]] = {}
    seen: set[int] = set()
    named = dict(token_layers(network))
    # The input embedding first: PEFT keeps shared rows under its name.
    order = [name for name in edge_layers(network) if name in named]
    for name in sorted(order, key=lambda one: named[one] is not network.get_input_embeddings()):
        rows = named[name].rows
        if id(rows) not in seen:
            seen.add(id(rows))
            found[name] = list(named[name].ids)
            tensors[f"{name}.token_adapter.trainable_tokens_delta"] = rows
    only = next(iter(found), None)
    if len(found) == 1 and only is not None and named[only] is network.get_input_embeddings():
        return found[only]
    return found


def _whole(network: Any, names: list[str], tensors: dict[str, Tensor]) -> tuple[list[str], bool]:
    """Put modules learned whole into `tensors`; returns their names, and whether tied weights stay tied."""
    listed: list[str] = []
    tied = False
    for name, module in also_modules(network, names).items():
        together = sharers(network, module._parameters.get("weight")) if "weight" in module._parameters else [name]
        for part, parameter in module.named_parameters():
            for other in together if part == "weight" else [name]:
                # Two files' worth of one weight, as PEFT writes it: a file may hold no tensor under two names.
                tensors[f"{other}.{part}"] = parameter if other == name else parameter.detach().clone()
        if len(together) > 1:
            tied = True
            name = next(one for one, edge in edge_layers(network).items() if edge is network.get_input_embeddings())
        listed.append(name)
    return list(dict.fromkeys(listed)), tied


def _targets(network: Any, chosen: set[str]) -> list[str] | str:
    """The last parts of the names where they say it exactly, else a regular expression of the whole names."""
    leaves = sorted({name.rpartition(".")[2] for name in chosen})
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    names = {name.removesuffix(".base") for name, module in network.named_modules() if isinstance(module, kinds)}
    if {name for name in names if name.rpartition(".")[2] in leaves} == chosen:
        return leaves
    return "|".join(re.escape(name) for name in sorted(chosen))


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number
