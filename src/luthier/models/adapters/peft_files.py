"""Adapters in the file format of the PEFT library: adapter_config.json and adapter_model.safetensors, read.

Tensor names are `base_model.model.<layer>.` and what they are, the layer named as in the transformers model
(https://huggingface.co/docs/peft/developer_guides/checkpoint): `lora_A.weight` [rank, in] and `lora_B.weight`
[out, rank] beside a linear layer, with `lora_magnitude_vector` [out] for DoRA; `lora_embedding_A` [rank, vocabulary] and
`lora_embedding_B` [dim, rank] beside an embedding; `token_adapter.trainable_tokens_delta` [tokens, dim], the rows of
`trainable_token_indices` themselves; and plain names for modules that were learned whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.core.errors import ModelError
from luthier.core.events import Events
from luthier.models.adapters.inject import (
    LoraEmbedding,
    LoraLayer,
    LoraLinear,
    also_modules,
    edge_layers,
    linear_layers,
    replace_layer,
    shape_of,
    sharers,
)
from luthier.models.adapters.magnitude import DoraLinear
from luthier.models.adapters.principal import PissaLinear
from luthier.models.adapters.tokens import grow, put_rows, token_layers
from luthier.models.quantised.linear import Form
from luthier.models.quantised.network import in_body

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
UNSUPPORTED = ("layer_replication", "lora_bias", "target_parameters", "alora_invocation_tokens")
PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "base",
    "base_layer.bias": "bias",
    "token_adapter.trainable_tokens_delta": "rows",
    "token_adapter.base_layer.weight": "base",
    "token_adapter.base_layer.bias": "bias",
}
# PEFT's own values of what its LoraConfig may leave out, and a file of settings with it.
DEFAULTS = {"r": 8, "lora_alpha": 8}
# What a base kept beside an adapter may differ from the one loaded by, relative: both may be rounded to bf16.
TOLERANCE = 1e-2

Named = dict[str, dict[str, Tensor]]


def read_adapter_config(directory: Path) -> dict[str, Any] | None:
    """The adapter's settings as they stand there (see `fill_in`); None where there is no adapter. Raises ModelError for one that
    is damaged, or a LoRA of a kind that cannot be loaded. Adapters of other types are read by `peft_methods`."""
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        settings: object = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError
    except (OSError, ValueError) as err:
        raise ModelError(f"{path}: cannot be read as an adapter's settings ({type(err).__name__})") from None
    if settings.get("peft_type") != "LORA":
        return settings
    for name in UNSUPPORTED:
        if settings.get(name):
            raise ModelError(f"{path}: {name} is set, which cannot be loaded; merge the adapter with peft first")
    rank, alpha = (settings.get(name, value) for name, value in DEFAULTS.items())
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ModelError(
            f"{directory}: {ADAPTER_CONFIG} gives the rank r as {rank!r}, which is no whole number above 0"
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ModelError(f"{directory}: {ADAPTER_CONFIG} gives lora_alpha as {alpha!r}, which is no number")
    return settings


def fill_in(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a LoRA with PEFT's own values where it says nothing, and a sentence about each."""
    missing = {name: value for name, value in DEFAULTS.items() if name not in settings}
    said = [f"{ADAPTER_CONFIG} does not say {name}, so it is {value}, as for PEFT" for name, value in missing.items()]
    return {**settings, **missing}, said


def attach_adapter(
    network: Any,
    directory: Path,
    settings: dict[str, Any],
    base: str,
    *,
    tokenizer: Any,
    events: Events,
    saved: dict[str, Any] | None = None,
    form: Form | None = None,
) -> dict[str, Any]:
    """Put the adapter in `directory` on `network`, and return it as settings of the Part that it is.

    `saved` are those settings where it was made here; `form` is how PiSSA holds what it leaves of the base. What belongs
    to an output layer that the network lacks, since it was loaded to classify, is left out with a warning. Raises
    ModelError when a layer is not there or has another shape: the adapter is for another base.
    """
    settings, assumed = fill_in(settings)
    for one in assumed:
        events.warn(f"{directory}: {one}")
    found = _sort(directory, network, base, events)
    _make_room(network, found, settings, directory, base)
    pissa = saved if saved is not None and saved.get("kind") == "pissa" else None
    for name, parts in found.items():
        if "A" in parts or "B" in parts:
            layer = _beside(network, name, parts, settings, directory, base, pissa, form)
            replace_layer(network, name, layer)
    # Files of peft bring no tokenizer with the tokens they add.
    tokens = [tokenizer.convert_ids_to_tokens(one) for one in _put_tokens(network, found, settings, directory)]
    tokens = [token for token in tokens if token is not None]
    also = _put_whole(network, found, settings, directory, base)
    pairs = {name for name, parts in found.items() if "A" in parts}
    every = pairs == {name.removesuffix(".base") for name in linear_layers(network)} - set(edge_layers(network))
    return {
        "kind": pissa["kind"] if pissa else "dora" if settings.get("use_dora") else "lora",
        "rank": int(pissa["rank"] if pissa else settings["r"]),
        "alpha": float(pissa["alpha"] if pissa else settings["lora_alpha"]),
        "dropout": float(settings.get("lora_dropout") or 0.0),
        "targets": "all-linear" if every else sorted({name.rpartition(".")[2] for name in pairs}),
        "rslora": bool(settings.get("use_rslora")),
        "ratio": float((saved or {}).get("ratio", 1.0)),
        "tokens": list((saved or {}).get("tokens") or tokens),
        "also": list((saved or {}).get("also") or _shortest(network, also)),
    }


def _sort(directory: Path, network: Any, base: str, events: Events) -> Named:
    """The adapter's tensors by layer and by what they are; names of PARTS, or "=weight" for what was learned whole."""
    path = directory / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        raise ModelError(f"{path}: cannot be read ({type(err).__name__}); the adapter is not whole") from None
    layers = linear_layers(network) | edge_layers(network)
    ends = "|".join(re.escape(end) for end in PARTS)
    body = network.base_model_prefix + "."
    headless = network.base_model is network and any(key.startswith(PREFIX + body) for key in tensors)
    found: Named = {}
    for key, tensor in tensors.items():
        if headless and not key.startswith(PREFIX + body):
            events.warn(f"{directory}: the adapter's part for the output layer is left out: this model has none")
            continue
        match = re.fullmatch(rf"(.+?)\.({ends})", key.removeprefix(PREFIX))
        if match is not None:
            name, part = _find(match[1], layers, network, directory, base), PARTS[match[2]]
        else:
            stated, _, leaf = key.removeprefix(PREFIX).rpartition(".")
            name, part = _find(stated, dict(network.named_modules()), network, directory, base), "=" + leaf
        found.setdefault(name, {})[part] = tensor.float()
    return found


@torch.no_grad()
def _make_room(network: Any, found: Named, settings: dict[str, Any], directory: Path, base: str) -> None:
    """Grow the vocabulary to what the adapter was made with, and check the base that it holds against this one."""
    edges = edge_layers(network)
    size = network.get_input_embeddings().weight.shape[0]
    needed, filled = size, size
    for name, parts in found.items():
        if name not in edges:
            continue
        kept = [parts[part] for part in ("base", "=weight") if part in parts]
        stated = [*(len(one) for one in kept), *([parts["A"].shape[1]] if _is_embedding(edges[name], parts) else [])]
        needed = max([needed, *stated])
        filled = max([filled, *(len(one) for one in kept)])
        if "rows" in parts:
            new = {one for one in _ids_of(settings, name) if one >= filled}
            needed = max([needed, *(one + 1 for one in new)])
            filled = max(filled, size + len(new)) if new == set(range(size, size + len(new))) else filled
    if needed > filled:
        raise ModelError(
            f"{directory}: this adapter is for another base: it was made with {needed} tokens, and {base} has {size}"
        )
    grow(network, needed)
    for name, parts in found.items():
        if "base" not in parts or name not in edges:
            continue
        weight = network.get_submodule(name).weight
        kept_VE = parts["base"].to(weight)
        part = min(size, len(kept_VE))
        limit = TOLERANCE * float(weight[:part].abs().max())
        if kept_VE.shape[1:] != weight.shape[1:] or float((kept_VE[:part] - weight[:part]).abs().max()) > limit:
            raise ModelError(f"{directory}: this adapter is for another base: the weights of {name} in {base} differ")
        weight[size : len(kept_VE)] = kept_VE[size:]


def _beside(
    network: Any,
    name: str,
    parts: dict[str, Tensor],
    settings: dict[str, Any],
    directory: Path,
    base: str,
    pissa: dict[str, Any] | None,
    form: Form | None,
) -> LoraLayer:
    """The layer `name` with its matrices beside it."""
    under = network.get_submodule(name)
    if not {"A", "B"} <= parts.keys() or bool(settings.get("use_dora")) != ("magnitude" in parts):
        raise ModelError(
            f"{directory / ADAPTER_WEIGHTS}: the layer {name} has one matrix of two; the adapter is not whole"
        )
    a_RI, b_OR = parts["A"], parts["B"]
    rank, stated = a_RI.shape[0], int(look_up(settings.get("rank_pattern"), name, settings["r"]))
    if rank != stated:
        raise ModelError(
            f"{directory}: the matrices of {name} have the rank {rank}, and {ADAPTER_CONFIG} says {stated}; the files do not "
            "belong together"
        )
    embedding = isinstance(under, nn.Embedding)
    if embedding and settings.get("use_dora"):
        raise ModelError(
            f"{directory}: use_dora is set for the embedding {name}, which cannot be loaded; merge the adapter with peft first"
        )
    outputs, inputs = under.weight.shape[::-1] if embedding else shape_of(under)
    if a_RI.shape != (rank, inputs) or b_OR.shape != (outputs, rank):
        raise ModelError(
            f"{directory}: this adapter is for another base: its layer {name} is {b_OR.shape[0]} x {a_RI.shape[1]}, and "
            f"that of {base} is {outputs} x {inputs}"
        )
    options: dict[str, Any] = {
        "dropout": float(settings.get("lora_dropout") or 0.0),
        "rslora": bool(settings.get("use_rslora")),
    }
    alpha = look_up(settings.get("alpha_pattern"), name, settings["lora_alpha"])
    layer: LoraLayer
    if pissa is not None:
        half, device = rank // 2, under.weight.device
        start = (a_RI[half:].to(device), -b_OR[:, half:].to(device))
        a_RI, b_OR = a_RI[:half], b_OR[:, :half]
        held = form if form is not None and in_body(network, name) else None
        layer = PissaLinear(under, half, float(pissa["alpha"]), start=start, form=held, **options)
    elif settings.get("use_dora"):
        layer = DoraLinear(under, rank, alpha, **options)
        with torch.no_grad():
            layer.lora_magnitude.copy_(parts["magnitude"])
    else:
        layer = (LoraEmbedding if embedding else LoraLinear)(under, rank, alpha, **options)
    with torch.no_grad():
        layer.lora_a.copy_(a_RI)
        layer.lora_b.copy_(b_OR)
    # A vocabulary that grew is kept beside the matrices: the base's files do not hold it.
    layer.keeps_base = "base" in parts
    return layer


def _put_tokens(network: Any, found: Named, settings: dict[str, Any], directory: Path) -> list[int]:
    """Put learned rows in their places; returns the ids of all."""
    rows_of = {name: parts["rows"] for name, parts in found.items() if "rows" in parts}
    if not rows_of:
        return []
    edges = edge_layers(network)
    if any(name not in edges for name in rows_of) or any("A" in found.get(name, {}) for name in edges):
        raise ModelError(
            f"{directory}: trainable_token_indices is set for a layer that is adapted in another way too, which cannot be "
            "loaded; merge the adapter with peft first"
        )
    ids_of = {name: _ids_of(settings, name) for name in rows_of}
    tied = len({id(edge.weight) for edge in edges.values()}) == 1
    apart = len({tuple(ids) for ids in ids_of.values()}) > 1
    put_rows(network, ids_of, apart=tied and apart)
    for name, layer in token_layers(network):
        if name in rows_of:
            with torch.no_grad():
                layer.rows.copy_(rows_of[name])
    return sorted({one for ids in ids_of.values() for one in ids})


def _put_whole(network: Any, found: Named, settings: dict[str, Any], directory: Path, base: str) -> list[str]:
    """Copy in the modules that were learned whole; returns their names. Tied weights that were learned apart part."""
    whole = {name: parts for name, parts in found.items() if any(part.startswith("=") for part in parts)}
    for name, parts in whole.items():
        module = network.get_submodule(name)
        for part, tensor in parts.items():
            held = module._parameters.get(part[1:])
            if held is None or held.shape != tensor.shape:
                shape = "nothing" if held is None else " x ".join(map(str, held.shape))
                raise ModelError(
                    f"{directory}: this adapter is for another base: {name}.{part[1:]} is "
                    f"{' x '.join(map(str, tensor.shape))}, and in {base} it is {shape}"
                )
            together = sharers(network, held) if part == "=weight" else [name]
            same = all(one in whole and torch.equal(whole[one]["=weight"], tensor) for one in together)
            if len(together) > 1 and not same and not settings.get("ensure_weight_tying"):
                module.weight = nn.Parameter(tensor.to(held))
                network.config.tie_word_embeddings = False
            else:
                with torch.no_grad():
                    held.copy_(tensor)
    return list(whole)


def _is_embedding(layer: nn.Module, parts: Iterable[str]) -> bool:
    return isinstance(layer, nn.Embedding) and "A" in parts


def _ids_of(settings: dict[str, Any], name: str) -> list[int]:
    """Which rows of the layer `name` learn: one list for the embedding, or one for each layer by the end of its name."""
    stated = settings.get("trainable_token_indices") or []
    if isinstance(stated, dict):
        # One of the two may have the body's prefix.
        pairs = {("." + key, "." + name): ids for key, ids in stated.items()}
        stated = next((ids for (one, two), ids in pairs.items() if two.endswith(one) or one.endswith(two)), [])
    return [int(one) for one in stated]


def _shortest(network: Any, names: list[str]) -> list[str]:
    """Names as short as they can be and still mean these modules alone."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    return leaves if set(also_modules(network, leaves)) == set(names) else sorted(names)


def _find(stated: str, layers: dict[str, Any], network: Any, directory: Path, base: str) -> str:
    """The layer's name in this network: with or without the body's prefix, as it was trained for another task."""
    prefix = network.base_model_prefix + "."
    for name in (stated, stated.removeprefix(prefix), prefix + stated):
        if name in layers:
            return name
    raise ModelError(f"{directory}: this adapter is for another base: {base} has no linear layer {stated}")


def look_up(patterns: Mapping[str, Any] | None, name: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf".*\.{pattern}$", "." + name):
            return float(value)
    return float(default)
