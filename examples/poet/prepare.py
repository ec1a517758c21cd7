"""Pick one poet's poems: python examples/poet/prepare.py --data DATA --output poems.jsonl [--author 白居易]

Reads lm_corpora/zh_tang_poems.jsonl.gz from DATA (default: $LUTHIER_DATA) and writes each poem as
{"prompt": "写一首诗，题为《...》", "completion": the poem}.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("LUTHIER_DATA"), help="folder of the data")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--author", default="李白")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data or set LUTHIER_DATA")
    with gzip.open(options.data / "lm_corpora" / "zh_tang_poems.jsonl.gz", "rt", encoding="utf-8") as lines:
        poems = [json.loads(line) for line in lines]
    chosen = [poem for poem in poems if poem["author"] == options.author]
    if not chosen:
        parser.error(f"no poem by {options.author}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with open(options.output, "w", encoding="utf-8") as file:
        for poem in chosen:
            row = {"prompt": f"写一首诗，题为《{poem['title']}》", "completion": poem["text"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{options.output}: {len(chosen)} poems by {options.author}")


if __name__ == "__main__":
    main()
