"""What a model is made of, and what tells two of them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from luthier.core.errors import ModelError
from luthier.models.heads import width_of
from luthier.models.mapped import AT_ONCE
from luthier.models.quantised.linear import QuantisedLinear, sample
from luthier.models.spec import Kind, LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes of a model. `context` is the longest input in tokens; None where the architecture sets no limit."""

    kind: Kind
    family: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    context: int | None
    parameters: int


def read_facts(network: Any) -> ModelFacts:
    """The facts of a loaded transformers model."""
    config = network.config
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    if config.is_encoder_decoder:
        layers = int(getattr(config, "encoder_layers", layers)) + int(
            getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None) or layers
        )
    return ModelFacts(
        kind=kind_of(config),
        family=config.model_type,
        layers=layers,
        hidden=width_of(config),
        heads=int(getattr(config, "num_attention_heads", 0) or 0),
        vocabulary=int(config.vocab_size),
        context=context_of(config),
        parameters=count_parameters(network),
    )


def kind_of(config: PreTrainedConfig) -> Kind:
    """Decoder, encoder or encoder-decoder, from a transformers config. Raises ModelError for none of them."""
    from transformers.models.auto import modeling_auto as names

    family = config.model_type
    if getattr(config, "is_encoder_decoder", False) and family in names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "encoder-decoder"
    if family in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "encoder"
    if family in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    raise ModelError(
        f"models of the family {family!r} are neither text decoders, encoders nor encoder-decoders; "
        "choose one of another family (llama, qwen3, bert, t5 ...)"
    )


def context_of(config: PreTrainedConfig) -> int | None:
    """The longest input in tokens that has a position; None where positions are relative and set no limit."""
    if config.model_type in ("t5", "mt5", "umt5") or (
        config.model_type.startswith("deberta") and not config.position_biased_input
    ):
        return None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            # RoBERTa and its kin number positions from just after the pad id.
            shifted = config.model_type in (
                "roberta",
                "xlm-roberta",
                "xlm-roberta-xl",
                "camembert",
                "roberta-prelayernorm",
            )
            return found - config.pad_token_id - 1 if shifted else found
    return None


@torch.no_grad()
def fingerprint(network: nn.Module, let_go: Callable[[], None] = lambda: None) -> str:
    """A short name of the weights below the head: SHA-256 over names, shapes and sampled values, 16 hex digits.

    The same for a model loaded for another task, in another precision or quantised (values are compared in bf16, as they
    were); different for another architecture or training. "" for a model that has its shape only.
    """
    if any(parameter.is_meta for parameter in network.parameters()):
        return ""
    digest = hashlib.sha256()
    below: nn.Module = getattr(network, "base_model", network)
    found, read = {}, 0
    for name, tensor in below.state_dict().items():
        found[name] = tuple(tensor.shape), sample(tensor)
        read += tensor.nbytes
        if read > AT_ONCE:
            read = 0
            let_go()
    let_go()
    for name, module in below.named_modules(remove_duplicate=False):
        if isinstance(module, QuantisedLinear):
            found[name + ".weight"] = (module.original_shape, module.original_sample)
    for name, (shape, values) in sorted(found.items()):
        if not name.startswith("pooler."):
            digest.update(f"{name}{shape}".encode() + values)
    return digest.hexdigest()[:16]


def base_fingerprint(model: LoadedModel, let_go: Callable[[], None] = lambda: None) -> str:
    """The fingerprint of a loaded model's own weights, taken once: they may be let go of later. To sample all of them is to read
    them all; `let_go` gives back what was read of files."""
    if model.fingerprint is None:
        model.fingerprint = fingerprint(model.network, let_go)
    return model.fingerprint


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, each once; a quantised weight counts as what it stands for."""
    packed = sum(one.in_features * one.out_features for one in module.modules() if isinstance(one, QuantisedLinear))
    return packed + sum(parameter.numel() for parameter in module.parameters())
