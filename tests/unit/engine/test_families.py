"""Greedy answers of many families of transformers, tiny and random: those of its own loop, alone and beside others."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.engine.generate import generate, uses_engine
from luthier.engine.padded import write
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model
from tiny import CONTEXT, tiny_loaded, tiny_tokenizer

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": CONTEXT,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What a family calls its sizes, needs beside them, or does not take (...).
FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": 8}, "mixtral": EXPERTS, "qwen2": {}, "qwen2_moe": EXPERTS, "qwen3": {},
    "qwen3_moe": EXPERTS, "gemma": {}, "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8}, "phi": {}, "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "gpt_neox": {}, "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": CONTEXT},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": CONTEXT},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "head_dim": ...},
    "bloom": {"n_layer": 2, "n_head": 4}, "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "stablelm": {}, "starcoder2": {"sliding_window": None}, "olmo": {}, "olmo2": {}, "cohere": {},
    "cohere2": {"sliding_window": 8},
    "granite": {}, "smollm3": {}, "nemotron": {}, "helium": {}, "persimmon": {}, "glm": {}, "glm4": {}, "biogpt": {},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}, "ernie4_5": {}, "arcee": {},
    "seed_oss": {}, "exaone4": {"sliding_window": 8}, "gpt_oss": {**EXPERTS, "sliding_window": 8}, "hunyuan_v1_dense": {},
    "olmoe": EXPERTS, "granitemoe": EXPERTS,
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family, places):
    tokenizer = tiny_tokenizer("llama")
    try:
        settings = {
            **SIZES,
            "vocab_size": len(tokenizer) + 8,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            **FAMILIES[family],
        }
        config = AutoConfig.for_model(family, **{name: one for name, one in settings.items() if one is not ...})
    except (KeyError, ValueError) as why:
        pytest.skip(f"this transformers has no {family}: {why}")
    torch.manual_seed(0)
    place = places / family
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place)
    tokenizer.save_pretrained(place)
    model = load_model(str(place))
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    draw, sampling = random.Random(1), Sampling(max_tokens=8)
    texts = [
        " ".join(draw.choices(["one", "two", "three", "four", "five", "six", "seven"], k=size))
        for size in (1, 4, 9, 20, 2, 30)
    ]
    together = generate(model, texts, sampling, raw=True)
    right = [tuple(write(model, [model.renderer.prompt(text, raw=True)], sampling)[0]) for text in texts]
    assert [one.ids for one in together] == right
    assert uses_engine(model) == (family not in PADDED)


# Those whose attention the engine's cannot stand in for: biases by distance, or an attention of their own.
PADDED = {"bloom", "mpt", "stablelm", "nemotron", "falcon"}


def test_the_tiny_models_of_other_tests_are_among_them():
    assert uses_engine(tiny_loaded("llama"))
