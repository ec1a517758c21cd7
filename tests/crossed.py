"""Tiny encoder-decoders of many families, with random weights large enough that answers differ."""

import copy
from functools import cache

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from luthier.models.load import load_model
from tiny import CONTEXT, _root, tiny_tokenizer

BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": CONTEXT, "decoder_start_token_id": 2,
    "init_std": 0.3, "activation_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 1, "dropout_rate": 0.0, "initializer_factor": 3.0}  # fmt: skip
# What a family needs, or calls its sizes.
SETTINGS = {
    "t5": T5, "mt5": T5, "umt5": T5, "bart": {**BART, "forced_eos_token_id": 2},
    "mbart": {**BART, "forced_bos_token_id": 7, "scale_embedding": True},
    "marian": {**BART, "decoder_start_token_id": 1, "tie_word_embeddings": False},
    "pegasus": BART,
    "blenderbot": {**BART, "encoder_no_repeat_ngram_size": 0}, "m2m_100": {**BART, "forced_bos_token_id": 9}, "led": BART,
    "switch_transformers": {**T5, "num_experts": 2},
}  # fmt: skip
# What its own module keeps in another way, and is padded.
PADDED = ("led",)


@cache
def made(family):
    """A directory; the tokenizer is that of a tiny bart."""
    place, tokenizer = _root() / f"crossed-{family}", tiny_tokenizer("bart")
    extra = {"attention_window": [8, 8], "max_encoder_position_embeddings": CONTEXT} if family == "led" else {}
    settings = {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "dropout": 0.0}
    config = AutoConfig.for_model(family, **settings, **SETTINGS[family], **extra)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@cache
def _loaded_once(family):
    return load_model(made(family))


def crossed(family, ends=True):
    """A loaded one of the caller's own; without `ends` it goes on to the last token it may write."""
    model = copy.deepcopy(_loaded_once(family))
    if not ends:
        model.spec = model.spec.model_copy(update={"stop_ids": ()})
    return model
