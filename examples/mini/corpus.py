"""Build mini's corpus: python examples/mini/corpus.py --data DIR --output DIR

Writes train.jsonl.gz ({"text", "source"}), heldout_en.jsonl, heldout_zh.jsonl (plain text, about 2 % of the documents),
heldout_chat.jsonl (2 % of the conversations) and sources.json. The same data give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sources import SOURCES, Source

SEED = 0
REPOSITORY = Path(__file__).resolve().parents[2]
SPECIALS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    source: Source
    language: str  # en or zh of the text itself, en-zh of a translation pair


def read_documents(data: Path, dropped: dict[str, Counter[str]]) -> list[Document]:
    """Every source's documents, without exact duplicates and without plain text that spells a special token."""
    seen: set[str] = set()
    documents: list[Document] = []
    for source in SOURCES:
        drop = dropped[source.name] = Counter()
        keep = random.Random(f"{SEED} {source.name}")
        for text in source.read(data / source.file, drop):
            if keep.random() >= source.share:
                drop["not in the share taken"] += 1
            elif text in seen:
                drop["exact duplicate"] += 1
            elif not source.chat and any(token in text for token in SPECIALS):
                drop["spells a special token"] += 1
            else:
                seen.add(text)
                documents.append(Document(text, source, language_of(text, source)))
    return documents


def language_of(text: str, source: Source) -> str:
    if source.language != "en-zh":
        return source.language
    share = sum("一" <= character <= "鿿" for character in text) / len(text)
    return "zh" if share > 0.5 else "en" if share == 0 else "en-zh"


def split_documents(
    documents: list[Document], dropped: dict[str, Counter[str]]
) -> tuple[list[Document], dict[str, list[Document]]]:
    """Hold out a part of each source's documents (2 %, see Source), and no translation pairs.

    A sentence may stand in several documents of the sentence pairs, so training documents lose the lines that were held out.
    """
    chance = random.Random(SEED)
    train: list[Document] = []
    held: dict[str, list[Document]] = {"en": [], "zh": [], "chat": []}
    for document in documents:
        if document.language != "en-zh" and chance.random() < document.source.held_out:
            held["chat" if document.source.chat else document.language].append(document)
        else:
            train.append(document)
    lines = {
        line for part in ("en", "zh") for d in held[part] if d.source.name == "tatoeba" for line in d.text.split("\n")
    }
    clean = []
    for document in train:
        if document.source.name == "tatoeba":
            blocks = document.text.split("\n\n" if document.language == "en-zh" else "\n")
            kept = [block for block in blocks if not lines.intersection(block.split("\n"))]
            dropped["tatoeba"]["sentence held out"] += len(blocks) - len(kept)
            if not kept:
                continue
            joined = ("\n\n" if document.language == "en-zh" else "\n").join(kept)
            document = Document(joined, document.source, document.language)
        clean.append(document)
    return clean, held


def write_rows(path: Path, documents: list[Document]) -> None:
    text = "".join(
        json.dumps({"text": d.text, "source": d.source.name}, ensure_ascii=False) + "\n" for d in documents
    ).encode()
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:  # no time stamp: the same data, the same bytes
            file.write(text)
        text = packed.getvalue()
    path.write_bytes(text)


def build_corpus(data: Path, output: Path) -> list[dict[str, object]]:
    """Write the corpus files to `output` and return the table of sources."""
    dropped: dict[str, Counter[str]] = {}
    train, held = split_documents(read_documents(data, dropped), dropped)
    random.Random(SEED).shuffle(train)
    output.mkdir(parents=True, exist_ok=True)
    write_rows(output / "train.jsonl.gz", train)
    for part, documents in held.items():
        write_rows(output / f"heldout_{part}.jsonl", documents)
    table: list[dict[str, object]] = []
    for source in SOURCES:
        texts = [document.text for document in train if document.source is source]
        table.append(
            {
                "source": source.name,
                "language": source.language,
                "chat": source.chat,
                "documents": len(texts),
                "held out": sum(d.source is source for documents in held.values() for d in documents),
                "characters": sum(map(len, texts)),
                "bytes": sum(len(text.encode()) for text in texts),
                "licence": source.licence,
                "attribution": source.attribution,
                "dropped": dict(dropped[source.name]),
            }
        )
    (output / "sources.json").write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("LUTHIER_DATA") or REPOSITORY.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    table = build_corpus(options.data, options.output)
    print(f"{'source':<14}{'language':<10}{'documents':>10}{'held out':>10}{'characters':>12}  licence")
    for row in table:
        print("{source:<14}{language:<10}{documents:>10,}{held out:>10,}{characters:>12,}  {licence}".format(**row))
        if row["dropped"]:
            print("    dropped: " + ", ".join(f"{n:,} {why}" for why, n in row["dropped"].items()))
    print("tokens for each source are printed by tokenizer.py")


if __name__ == "__main__":
    main()
