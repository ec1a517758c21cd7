"""Random decoders of many families, large enough for the native one: every norm and bias does something.

`decoder_model("llama")` is a copy, the caller's own, of what is loaded once a session from a directory in MADE.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.models.load import load_model
from luthier.models.spec import LoadedModel
from tiny import CONTEXT, tiny_tokenizer

SIZES = {
    "hidden_size": 96, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": CONTEXT,
}  # fmt: skip
GPT2 = {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": CONTEXT}
# Families with each thing that a layer can have, and what they call their sizes.
FAMILIES = {
    "llama": {"num_key_value_heads": 6, "attention_bias": True}, "mistral": {"sliding_window": 40}, "qwen2": {}, "qwen3": {},
    "gemma": {}, "gemma2": {"sliding_window": 40, "query_pre_attn_scalar": 32, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 40, "query_pre_attn_scalar": 32}, "phi": {"head_dim": ...},
    "phi3": {"pad_token_id": 0, "head_dim": ...},
    "gpt2": GPT2, "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layers": [1, 0, 1]}, "arcee": {}, "starcoder2": {"sliding_window": None},
    "seed_oss": {},
}  # fmt: skip


# Where each lies.
MADE: dict[str, Path] = {}
LOADED: dict[str, LoadedModel] = {}


def decoder_model(family: str, **more: Any) -> LoadedModel:
    """A model of that family; `more` goes into its config, where ... takes a size out."""
    key = f"{family} {sorted(more.items(), key=str)}"
    if key not in MADE:
        MADE[key] = _make(family, more)
        LOADED[key] = load_model(str(MADE[key]))
    return copy.deepcopy(LOADED[key])


@cache
def _root() -> Path:
    path = Path(tempfile.mkdtemp(prefix="luthier-decoders-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _make(family: str, more: dict[str, Any]) -> Path:
    tokenizer = tiny_tokenizer("llama")
    settings = {
        **SIZES, "vocab_size": len(tokenizer) + 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
        **FAMILIES.get(family, {}), **more,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **{name: one for name, one in settings.items() if one is not ...})
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            # Far from what initialisation leaves: norms and biases that do something.
            weight.add_(torch.randn_like(weight) * (0.1 if "norm" in name or "bias" in name else 0.05))
    place = Path(tempfile.mkdtemp(dir=_root()))
    network.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place
