"""Pairs that prefer short answers: python examples/brief/prepare.py --data DATA --output FOLDER

Reads instruction/alpaca_{en,zh}_demo.jsonl.gz from DATA (default: $LUTHIER_DATA) and writes pairs.jsonl, whose chosen
answer is the first sentence of the given one and whose rejected answer is the given one, and prompts.jsonl, the prompts
of twenty rows that are in no pair.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
from pathlib import Path

SENTENCE = re.compile(r".+?[.!?。！？](?=\s|$|[^\x00-\x7f])", re.DOTALL)
LONGEST_PROMPT, SHORTEST_ANSWER, LONGEST_ANSWER = 120, 8, 240


def pair(row: dict[str, str]) -> dict[str, str] | None:
    """A row as a pair, or None where it is long, or its answer is a list, or one sentence."""
    prompt = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    answer = row["output"].strip()
    found = SENTENCE.match(answer)
    if found is None or len(prompt) > LONGEST_PROMPT or answer[0].isdigit():
        return None
    first = found[0]
    if not SHORTEST_ANSWER <= len(first) <= LONGEST_ANSWER // 2 or len(answer) < 2 * len(first):
        return None
    return {"prompt": prompt, "chosen": first, "rejected": answer[:LONGEST_ANSWER]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("LUTHIER_DATA"), help="folder of the data")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data or set LUTHIER_DATA")
    pairs = []
    for language in ("en", "zh"):
        with gzip.open(
            options.data / "instruction" / f"alpaca_{language}_demo.jsonl.gz", "rt", encoding="utf-8"
        ) as lines:
            pairs += [made for made in map(pair, map(json.loads, lines)) if made is not None]
    options.output.mkdir(parents=True, exist_ok=True)
    kept, aside = [one for at, one in enumerate(pairs) if at % 40], pairs[::40][:20]
    for name, rows in (("pairs", kept), ("prompts", [{"prompt": one["prompt"]} for one in aside])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{options.output}: {len(kept)} pairs, {len(aside)} prompts")


if __name__ == "__main__":
    main()
