"""Training, validation and test parts that share nothing."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from luthier.core.config import Config
from luthier.core.errors import DataError, did_you_mean
from luthier.core.types import Chat, Example, Feedback, Labelled, Pair, Preference, Text


class Split(Config):
    """How rows are held out when no files are given for it. Rows with equal text always stay on one side."""

    method: Literal["auto", "random", "stratified", "grouped"] = "auto"
    """auto: stratified where there are classes, else random. grouped: rows with the same value in `by` stay together."""
    validation: float = Field(0.1, ge=0, lt=1)
    """Share of the rows for validation."""
    test: float = Field(0.0, ge=0, lt=1)
    """Share of the rows for the test."""
    by: str | None = None
    """The column whose value makes a group, for grouped."""
    seed: int = 0
    """Seed of the draw."""

    @model_validator(mode="after")
    def _check(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave no rows to train on")
        if (self.method == "grouped") != (self.by is not None):
            raise ValueError("method: grouped goes with `by`, the column that makes the groups")
        return self


@dataclass(frozen=True, slots=True)
class Parts:
    """The rows of each part, in their first order."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def split_examples(
    examples: Sequence[Example], split: Split, shares: dict[str, float], sources: Sequence[str] = ()
) -> Parts:
    """Divide `examples` into the parts of `shares` (train is the rest), each of `sources` (one a row) in proportion.

    Deterministic in the rows and the seed.

    Groups of rows that belong together are dealt in a drawn order, the largest first, each to the part that lacks most
    of its class relative to what it should get. Raises DataError for a `by` column that rows do not have.
    """
    groups = group_rows(examples, split.by)
    stratify = split.method == "stratified" or (split.method == "auto" and isinstance(examples[0], Labelled))
    classes = [_class_of(example) if stratify else "" for example in examples]
    if any(sources):
        classes = [f"{source}\n{name}" for source, name in zip(sources, classes)]
    wanted: dict[tuple[str, str], float] = {}
    for name, count in Counter(classes).items():
        for part, share in {"train": 1 - sum(shares.values()), **shares}.items():
            wanted[part, name] = share * count
    order = np.random.default_rng(split.seed).permutation(len(groups))
    ordered = sorted((groups[at] for at in order), key=len, reverse=True)
    held: dict[tuple[str, str], int] = defaultdict(int)
    place: dict[int, str] = {}
    for group in ordered:
        name = Counter(classes[row] for row in group).most_common(1)[0][0]
        parts = [part for part in ("train", *shares) if wanted[part, name] > 0]
        chosen = max(parts, key=lambda part: (wanted[part, name] - held[part, name]) / wanted[part, name])
        for row in group:
            place[row] = chosen
            held[chosen, classes[row]] += 1
    dealt: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for row, example in enumerate(examples):
        dealt[place[row]].append(example)
    return Parts(**dealt)


def group_rows(examples: Sequence[Example], by: str | None = None) -> list[list[int]]:
    """Rows that must stay together: equal text, or the same value in the column `by`, or both through others."""
    leader = list(range(len(examples)))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    first: dict[tuple[str, object], int] = {}
    for row, example in enumerate(examples):
        keys: list[tuple[str, object]] = [("text", content_key(example))]
        if by is not None:
            if by not in example.meta:
                raise DataError(f"{example.id}: split.by: there is no column {by!r}; {did_you_mean(by, example.meta)}")
            keys.append(("by", str(example.meta[by])))
        for key in keys:
            leader[find(row)] = find(first.setdefault(key, row))
    groups: dict[int, list[int]] = defaultdict(list)
    for row in range(len(examples)):
        groups[find(row)].append(row)
    return list(groups.values())


def content_key(example: Example) -> str:
    """What makes two rows duplicates: the text that is read (not the answer), NFKC, case and spaces folded."""
    if isinstance(example, Chat):
        last = max((at for at, turn in enumerate(example.messages) if turn.role == "assistant"), default=0)
        text = "\n".join(f"{turn.role}: {turn.content}" for turn in example.messages[:last] if turn.role != "system")
        text = text or example.messages[last].content
    elif isinstance(example, Preference | Feedback):
        turns = [turn for turn in example.prompt if turn.role != "system"] or example.prompt
        text = "\n".join(f"{turn.role}: {turn.content}" for turn in turns)
    elif isinstance(example, Pair):
        text = example.source
    elif isinstance(example, Labelled):
        text = example.text if example.pair is None else f"{example.text}\n{example.pair}"
    else:
        assert isinstance(example, Text)
        text = example.text
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _class_of(example: Example) -> str:
    label = example.label if isinstance(example, Labelled) else ""
    if isinstance(label, float) or label is None:
        return ""
    return " ".join(label) if isinstance(label, tuple) else label
