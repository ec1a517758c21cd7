"""Write mini's shape, without weights, beside its tokenizer: python examples/mini/shape.py --tokenizer DIR --output DIR"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig

CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    shutil.copytree(options.tokenizer, options.output, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ).save_pretrained(options.output)


if __name__ == "__main__":
    main()
