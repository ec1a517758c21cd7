"""Make the files of the translation story: python examples/translation/prepare.py --data DATA --output DIR

Reads Multi30k (translation/multi30k_*.jsonl, columns en and de) from DATA (default: $LUTHIER_DATA), trains a byte-level
BPE on both languages together, and writes DIR/model: a Marian-shaped encoder-decoder's config.json and its tokenizer,
without weights. `luthier tune --from-scratch` starts from there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import MarianConfig

from luthier.text.bpe import save_tokenizer, train_bpe

VOCABULARY, WIDTH, LAYERS, CONTEXT = 6000, 256, 3, 128
PAD, END = "<pad>", "</s>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("LUTHIER_DATA"), help="folder of the data")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data or set LUTHIER_DATA")
    with gzip.open(options.data / "translation" / "multi30k_train_en_de_fr.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    tokenizer = train_bpe((row[side] for row in rows for side in ("en", "de")), VOCABULARY, [PAD, END])
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, end)]
    )
    model = options.output / "model"
    save_tokenizer(tokenizer, model, chat_template="", pad_token=PAD, eos_token=END, model_max_length=CONTEXT)
    MarianConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        max_position_embeddings=CONTEXT,
        dropout=0.1,
        scale_embedding=True,
        pad_token_id=tokenizer.token_to_id(PAD),
        eos_token_id=end,
        decoder_start_token_id=tokenizer.token_to_id(PAD),
        forced_eos_token_id=None,
        bos_token_id=None,
    ).save_pretrained(model)
    print(f"{model}: {LAYERS} + {LAYERS} layers of {WIDTH}, {VOCABULARY} entries, no weights yet")


if __name__ == "__main__":
    main()
