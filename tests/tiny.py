"""Tiny models of every supported family, made on the fly: random weights and a small real tokenizer.

`tiny_model("llama")` gives a directory that loads like any other model: config.json, model.safetensors and tokenizer
files. Directories are made once a session, in a temporary place, and are not to be changed (copy them first).
`tiny_loaded("llama")` is loaded from there: a copy of what was loaded once, for tests that do not ask how one is loaded.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from luthier.models.load import load_model
from luthier.models.spec import LoadedModel

FAMILIES: dict[str, tuple[str, ...]] = {
    "decoder": ("gpt2", "opt", "gpt_neo", "llama", "qwen2", "qwen3", "gemma", "mistral"),
    "encoder": ("bert", "roberta", "deberta-v2", "modernbert"),
    "encoder-decoder": ("t5", "bart", "marian"),
}
ALL_FAMILIES = tuple(family for families in FAMILIES.values() for family in families)
NATURAL_TASK = {"decoder": "causal", "encoder": "masked", "encoder-decoder": "seq2seq"}
CONTEXT = 128
VOCABULARY = 400

CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "A tuned model answers briefly, and says when it does not know.",
    "User: What is the capital of France? Assistant: The capital of France is Paris.",
    "Win a free prize now! Call 0800 123 456 before midnight.",
    "Ok, see you at the station at seven. Do not forget the tickets.",
    "房间很干净，服务员非常热情，下次还会来。",
    "酒店的位置不好，晚上太吵，早餐也很一般。",
    "One two three four five six seven eight nine ten.",
    "Ein Mann fährt mit dem Fahrrad durch den Park.",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def kind_of(family: str) -> str:
    """ "decoder", "encoder" or "encoder-decoder"."""
    return next(kind for kind, families in FAMILIES.items() if family in families)


@cache
def _root() -> Path:
    path = Path(tempfile.mkdtemp(prefix="luthier-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def tiny_model(family: str, task: str | None = None, seed: int = 0) -> Path:
    """A directory with a tiny random model of `family`, made for its natural task.

    `task` only names the purpose: classify and regress grow their heads at load, so they share the natural directory.
    """
    kind = kind_of(family)
    if task is not None and task != NATURAL_TASK[kind]:
        return tiny_model(family, None, seed)
    path = _root() / f"{family}-{seed}"
    if path.exists():
        return path
    tokenizer = tiny_tokenizer(family)
    config = AutoConfig.for_model(family, **_settings(family, tokenizer))
    made = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM, "encoder-decoder": AutoModelForSeq2SeqLM}
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = made[kind].from_config(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    logging.enable_progress_bar()
    return path


@cache
def _loaded_once(family: str, **options: Any) -> LoadedModel:
    return load_model(str(tiny_model(family)), **options)


def tiny_loaded(family: str, **options: Any) -> LoadedModel:
    """A model of the caller's own, as `load_model` gives it."""
    return copy.deepcopy(_loaded_once(family, **options))


@cache
def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the family's own manner: which special tokens exist, and which are added to a text.

    gpt2, gpt_neo: no token added, no pad token. opt: </s> in front, as the real one. llama, mistral, gemma: <s> in
    front. qwen2, qwen3: none added, ChatML tokens and template. bert: WordPiece, [CLS] text [SEP]. t5, marian:
    text </s>. bart, roberta: <s> text </s>.
    """
    if family in ("bert", "deberta-v2", "modernbert"):
        names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        core = _train(list(names.values()), wordpiece=family == "bert")
        _frame(core, "[CLS]", "[SEP]", between=("[SEP]",))
        return _wrap(core, names, segments=family == "bert")
    if family == "roberta":
        names = {
            "bos": "<s>",
            "pad": "<pad>",
            "eos": "</s>",
            "unk": "<unk>",
            "mask": "<mask>",
            "cls": "<s>",
            "sep": "</s>",
        }
        core = _train(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        _frame(core, "<s>", "</s>", between=("</s>", "</s>"))
        return _wrap(core, names)
    if family in ("t5", "marian"):
        core = _train(["<pad>", "</s>", "<unk>"])
        _frame(core, None, "</s>", between=("</s>",))
        return _wrap(core, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"})
    if family == "bart":
        core = _train(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        _frame(core, "<s>", "</s>", between=("</s>", "</s>"))
        return _wrap(core, {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"})
    if family in ("qwen2", "qwen3"):
        core = _train(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tokenizer = _wrap(core, {"eos": "<|im_end|>", "pad": "<|endoftext|>"})
        tokenizer.chat_template = CHATML
        return tokenizer
    if family in ("llama", "mistral"):
        core = _train(["<unk>", "<s>", "</s>"])
        _frame(core, "<s>", None)
        return _wrap(core, {"unk": "<unk>", "bos": "<s>", "eos": "</s>"})
    if family == "gemma":
        core = _train(["<pad>", "<eos>", "<bos>", "<unk>"])
        _frame(core, "<bos>", None)
        return _wrap(core, {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"})
    if family == "opt":
        core = _train(["<s>", "<pad>", "</s>", "<unk>"])
        _frame(core, "</s>", None)
        return _wrap(core, {"bos": "</s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"})
    core = _train(["<|endoftext|>"])
    return _wrap(core, {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"})


def _train(specials: list[str], wordpiece: bool = False) -> Tokenizer:
    if wordpiece:
        core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        core.normalizer = normalizers.BertNormalizer(lowercase=True)
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=letters, show_progress=False
        )
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    core.train_from_iterator(CORPUS, trainer)
    return core


def _frame(core: Tokenizer, first: str | None, last: str | None, between: Sequence[str] = ()) -> None:
    """Add `first` and `last` around a text, and `between` between the two of a pair, with segment ids 0 and 1."""
    head, tail = ([first] if first else []), ([last] if last else [])
    used = sorted({*head, *tail, *between})
    core.post_processor = processors.TemplateProcessing(
        single=[f"{part}:0" for part in [*head, "$A", *tail]],
        pair=[f"{part}:0" for part in [*head, "$A", *between]] + [f"{part}:1" for part in ["$B", *tail]],
        special_tokens=[(token, core.token_to_id(token)) for token in used],
    )


def _wrap(core: Tokenizer, names: dict[str, str], segments: bool = False) -> PreTrainedTokenizerFast:
    settings: dict[str, Any] = {f"{name}_token": token for name, token in names.items()}
    if segments:
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=CONTEXT, clean_up_tokenization_spaces=False, **settings
    )


def _settings(family: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Arguments of the family's config: two layers, 32 wide, four heads, no dropout."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    common = {"vocab_size": len(tokenizer), **{name: found for name, found in ids.items() if found is not None}}
    modern = {
        **common,
        "pad_token_id": ids["pad_token_id"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
    }
    if family in ("llama", "qwen2", "qwen3", "gemma", "mistral"):
        if family == "qwen2":
            del modern["head_dim"]
        tied = {"qwen2": True, "qwen3": True, "gemma": True}
        return {**modern, "tie_word_embeddings": tied.get(family, False)}
    if family == "gpt2":
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return {**common, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, **none}
    if family == "gpt_neo":
        none = {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
        sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64, "window_size": 16}
        return {
            **common,
            **sizes,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": CONTEXT,
            **none,
        }
    if family == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return {
            **common,
            **sizes,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": CONTEXT,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        }
    if family in ("bert", "roberta", "deberta-v2"):
        del modern["num_key_value_heads"], modern["head_dim"]
        settings = {**modern, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2}
        if family == "roberta":
            # Positions start after the pad id, so two places are lost.
            settings |= {"max_position_embeddings": CONTEXT + 2, "type_vocab_size": 1}
        if family == "deberta-v2":
            settings |= {
                "type_vocab_size": 0,
                "relative_attention": True,
                "position_buckets": 16,
                "max_relative_positions": -1,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_biased_input": False,
            }
        return settings
    if family == "modernbert":
        del modern["num_key_value_heads"], modern["head_dim"]
        marks = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        # ModernBERT calls its frame bos and eos too.
        frame = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        return {**modern, **marks, **frame, "local_attention": 16, "global_attn_every_n_layers": 2}
    if family == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
        return {**common, **sizes, "dropout_rate": 0.0, "decoder_start_token_id": tokenizer.pad_token_id}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": CONTEXT}
    settings = {**common, **layers, **widths, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    if family == "marian":
        pad = tokenizer.pad_token_id
        return {
            **settings,
            "decoder_start_token_id": pad,
            "decoder_vocab_size": len(tokenizer),
            "forced_eos_token_id": 1,
        }
    return {**settings, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
