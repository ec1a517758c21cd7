"""What a set of examples is like, before anything is learned from it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.core.types import Chat, Example, Feedback, Labelled, Pair, Preference, Text
from luthier.data.split import content_key

SCRIPTS = {
    "LATIN": "Latin",
    "CJK": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "HANGUL": "Hangul",
    "CYRILLIC": "Cyrillic",
    "ARABIC": "Arabic",
}
# Scripts are counted on so many characters of a text: enough for a share, and quick on long documents.
LOOKED_AT = 200


def profile_examples(examples: Sequence[Example]) -> dict[str, Any]:
    """Rows, duplicates, lengths in characters, scripts, and labels or scores, as plain JSON values.

    `duplicates` counts rows that repeat an earlier one (case and spaces folded); `conflicts` those among them whose
    label differs from the first one's.
    """
    texts = [text_of(example) for example in examples]
    lengths = np.array([len(text) for text in texts])
    first: dict[str, Example] = {}
    duplicates = conflicts = 0
    for example in examples:
        known = first.setdefault(content_key(example), example)
        if known is not example:
            duplicates += 1
            conflicts += isinstance(example, Labelled) and isinstance(known, Labelled) and example.label != known.label
    found: dict[str, Any] = {
        "rows": len(examples),
        "kind": type(examples[0]).__name__ if examples else "",
        "duplicates": duplicates,
        "conflicts": int(conflicts),
        "characters": {
            "median": int(np.median(lengths)),
            "p95": round(float(np.percentile(lengths, 95))),
            "max": int(lengths.max()),
            "total": int(lengths.sum()),
        },
        "scripts": count_scripts(texts),
    }
    labels: Counter[str] = Counter()
    scores: list[float] = []
    for example in examples:
        label = example.label if isinstance(example, Labelled) else None
        if isinstance(label, float):
            scores.append(label)
        elif label is not None:
            labels.update(label if isinstance(label, tuple) else (label,))
    if labels:
        found["labels"] = dict(labels.most_common())
        found["imbalance"] = round(max(labels.values()) / min(labels.values()), 2)
    if scores:
        quantiles = np.percentile(scores, [0, 25, 50, 75, 100])
        found["scores"] = dict(
            zip(("min", "p25", "median", "p75", "max"), (round(float(value), 4) for value in quantiles))
        )
    if examples and isinstance(examples[0], Chat):
        turns = [len(example.messages) for example in examples if isinstance(example, Chat)]
        found["turns"] = {"median": int(np.median(turns)), "max": max(turns)}
    found.update(_profile_answers(examples))
    return found


def _profile_answers(examples: Sequence[Example]) -> dict[str, Any]:
    """Of preferences: characters of the chosen and the rejected answers, and how often the longer one is chosen (a model
    may learn that alone). Of feedback: how many answers are good."""
    pairs = [
        [sum(len(turn.content) for turn in answer) for answer in (example.chosen, example.rejected)]
        for example in examples
        if isinstance(example, Preference)
    ]
    if pairs:
        chosen_N, rejected_N = np.array(pairs).T
        return {
            "chosen_characters": int(np.median(chosen_N)),
            "rejected_characters": int(np.median(rejected_N)),
            "longer_chosen": round(float((chosen_N > rejected_N).mean()), 4),
        }
    verdicts = [example.good for example in examples if isinstance(example, Feedback)]
    return {"good": sum(verdicts), "bad": len(verdicts) - sum(verdicts)} if verdicts else {}


def text_of(example: Example) -> str:
    """All the text of an example, in reading order."""
    if isinstance(example, Chat):
        return "\n".join(turn.content for turn in example.messages)
    if isinstance(example, Preference):
        return "\n".join(turn.content for turn in (*example.prompt, *example.chosen, *example.rejected))
    if isinstance(example, Feedback):
        return "\n".join(turn.content for turn in (*example.prompt, *example.answer))
    if isinstance(example, Pair):
        return f"{example.source}\n{example.target}"
    if isinstance(example, Labelled) and example.pair is not None:
        return f"{example.text}\n{example.pair}"
    assert isinstance(example, Text | Labelled)
    return example.text


def count_scripts(texts: Sequence[str]) -> dict[str, float]:
    """Share of each script among the letters, largest first; shares under 0.1 % are left out."""
    counts: Counter[str] = Counter()
    for character, count in Counter(
        letter for text in texts for letter in text[:LOOKED_AT] if letter.isalpha()
    ).items():
        name = unicodedata.name(character, "").split(" ")[0]
        counts[SCRIPTS.get(name, "other")] += count
    total = sum(counts.values())
    return {name: round(count / total, 4) for name, count in counts.most_common() if count / total >= 0.001}
