"""Train mini's tokenizer: python examples/mini/tokenizer.py --corpus DIR --output DIR [--gpt2 DIR]

Byte-level BPE of 8,192 entries on the training part of the corpus. Prints the tokens of each source and the compression on the
held-out parts, beside GPT-2's tokenizer when its folder (vocab.json, merges.txt) is given.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from corpus import SPECIALS
from sources import TEMPLATE
from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer

from luthier.text.bpe import save_tokenizer, train_bpe

VOCABULARY = 8192
CONTEXT = 512


def read_texts(path: Path) -> list[dict[str, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def compression(tokenizer: Tokenizer | ByteLevelBPETokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes a token."""
    size = tokens = 0
    for text in texts:
        size += len(text.encode())
        tokens += len(tokenizer.encode(text).ids)
    return size / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gpt2", type=Path, help="folder of GPT-2's vocab.json and merges.txt, to compare with")
    options = parser.parse_args()
    train = read_texts(options.corpus / "train.jsonl.gz")
    tokenizer = train_bpe((row["text"] for row in train), VOCABULARY, SPECIALS)
    pad, end, *roles = SPECIALS
    save_tokenizer(
        tokenizer,
        options.output,
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
        pad_token=pad,
        eos_token=end,
        additional_special_tokens=roles,
        model_max_length=CONTEXT,
    )
    tokens: Counter[str] = Counter()
    for row in train:
        tokens[row["source"]] += len(tokenizer.encode(row["text"]).ids) + 1  # and the <|end|> after each document
    total = tokens.total()
    table = json.loads((options.corpus / "sources.json").read_text(encoding="utf-8"))
    print(f"{'source':<14}{'documents':>10}{'characters':>12}{'tokens':>11}{'share':>8}  licence")
    for row in table:
        n = tokens[row["source"]]
        print(
            f"{row['source']:<14}{row['documents']:>10,}{row['characters']:>12,}{n:>11,}{n / total:>8.1%}  {row['licence']}"
        )
    # A translation pair counts half to each language.
    weight = {"en": 0.0, "en-zh": 0.5, "zh": 1.0}
    chinese = sum(weight[row["language"]] * tokens[row["source"]] for row in table) / total
    chat = sum(tokens[row["source"]] for row in table if row["chat"]) / total
    print(f"{total:,} tokens: English {1 - chinese:.1%}, Chinese {chinese:.1%}; conversations {chat:.1%}")
    held = {
        part: [row["text"] for row in read_texts(options.corpus / f"heldout_{part}.jsonl")] for part in ("en", "zh")
    }
    compared: dict[str, Tokenizer | ByteLevelBPETokenizer] = {"mini": tokenizer}
    if options.gpt2:
        files = str(options.gpt2 / "vocab.json"), str(options.gpt2 / "merges.txt")
        compared["gpt2"] = ByteLevelBPETokenizer.from_file(*files)
    for name, candidate in compared.items():
        size = candidate.get_vocab_size()
        numbers = ", ".join(f"{part} {compression(candidate, texts):.2f}" for part, texts in held.items())
        print(f"bytes a token, held out: {name} ({size:,} entries): {numbers}")


if __name__ == "__main__":
    main()
