"""Models of known shapes with random weights, and rows with lengths as in Alpaca: what the benchmarks run on."""

from __future__ import annotations

import json
import random
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

SHAPES = {
    # Llama, dim 288, 6 layers: the TinyStories 15M shape.
    "15m": {"model_type": "llama", "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6,
            "num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 32000},
    # HuggingFaceTB/SmolLM2-135M
    "135m": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    # Qwen/Qwen3-0.6B
    "0.6b": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    # Qwen/Qwen3-8B
    "8b": {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    # openai-community/gpt2, 124 M
    "gpt2": {"model_type": "gpt2"},
}  # fmt: skip
WORDS = "time year people way day man thing woman life child world school state family student group country problem"


def config_of(shape: str) -> Any:
    """transformers' config of a model of `shape`."""
    from transformers import AutoConfig

    settings = dict(SHAPES[shape])
    return AutoConfig.for_model(
        settings.pop("model_type"),
        max_position_embeddings=1024 if shape == "gpt2" else 2048,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **settings,
    )


def make_model(shape: str, folder: Path) -> Path:
    """A directory with a random model of `shape` in bf16 and the tokenizer of `mini`; made once."""
    path = folder / shape
    if (path / "model.safetensors").exists():
        return path
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    mini = Path(str(files("luthier"))) / "assets" / "mini"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(mini / name, path / name)
    limits = path / "tokenizer_config.json"
    limits.write_text(
        json.dumps({**json.loads(limits.read_text()), "model_max_length": config.max_position_embeddings})
    )
    return path


def write_rows(path: Path, rows: int = 1000, seed: int = 0) -> None:
    """Conversations of random words: lengths lognormal with median 90 and 95th percentile 350, at most 1,024 tokens;
    four tenths of each are the question."""
    draw, words = random.Random(seed), WORDS.split()
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            length = min(1000, max(16, round(draw.lognormvariate(4.5, 0.826))))
            say = lambda count: " ".join(draw.choices(words, k=max(1, round(count * 0.92))))  # noqa: E731
            turns = [
                {"role": "user", "content": say(0.4 * length)},
                {"role": "assistant", "content": say(0.6 * length)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
