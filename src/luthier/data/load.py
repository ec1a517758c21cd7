"""From what was asked to examples in parts: read, map, check, split."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import Field, field_serializer, model_validator

from luthier.core.config import Config
from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Example, Labelled
from luthier.data.profile import profile_examples
from luthier.data.shapes import Columns, Shape, recognise, to_example
from luthier.data.sources import describe_source, read_rows
from luthier.data.split import Split, content_key, split_examples

# How many bad rows an error names before it only counts.
NAMED = 5


class Data(Config):
    """Where the rows are and how to read them. A path alone means `train`."""

    train: Any
    """A file, a directory, "sms_spam", hub:owner/name, or a list or table of rows."""
    validation: Any = None
    """The same, for validation; by default a share of `train` (see split)."""
    test: Any = None
    """The same, for the final test."""
    columns: Columns = Columns()
    """Which column holds what, where the names are not the usual ones."""
    shape: Shape | Literal["auto"] = "auto"
    """The shape of the rows; auto goes by their columns."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """What to do about rows that cannot be used: refuse the data, naming them, or drop and count them."""
    split: Split = Split()
    """How rows are held out where no file is given."""
    limit: int | None = Field(None, gt=0)
    """Use only so many rows of each source, from its start."""

    @model_validator(mode="before")
    @classmethod
    def _accept_source(cls, value: Any) -> Any:
        return value if isinstance(value, dict | Data) else {"train": value}

    @field_serializer("train", "validation", "test")
    def _describe(self, source: Any) -> str | None:
        return None if source is None else describe_source(source)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples in their parts, with what is worth recording of them."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    shape: Shape
    fingerprint: str
    """SHA-256 over the contents of all parts, in order."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    profile: dict[str, Any] = field(default_factory=dict)
    """`profile_examples` of all rows together, and the rows of each part."""


def load_data(data: Data, events: Events) -> Dataset:
    """Read every source, and hold out what was not given.

    Raises DataError: a source that is missing or empty, bad rows (unless they are to be dropped), only one class, a
    label that occurs in validation or test alone. Rows that stand in two given parts are a counted warning.
    """
    dropped: Counter[str] = Counter()
    train, shape = _read(data.train, data, events, dropped)
    validation = _read(data.validation, data, events, dropped)[0] if data.validation is not None else []
    test = _read(data.test, data, events, dropped)[0] if data.test is not None else []
    whole = profile_examples([*train, *validation, *test])
    fingerprint = fingerprint_examples([*train, *validation, *test])
    shares = {}
    if data.validation is None and data.split.validation > 0:
        shares["validation"] = data.split.validation
    if data.test is None and data.split.test > 0:
        shares["test"] = data.split.test
    _warn_shared(train, {"validation": validation, "test": test}, events)
    if shares:
        parts = split_examples(train, data.split, shares)
        train, validation, test = parts.train, parts.validation or validation, parts.test or test
        if not train:
            raise DataError(
                f"{describe_source(data.train)}: {whole['rows']} rows are too few to hold any out; set data.split.validation: 0"
            )
    _check_labels(train, validation, test)
    if whole["duplicates"]:
        events.choose(
            "duplicates",
            whole["duplicates"],
            "rows repeat an earlier one; equal rows are kept on one side of the split",
        )
    sizes = {"train": len(train), "validation": len(validation), "test": len(test)}
    return Dataset(train, validation, test, shape, fingerprint, dict(dropped), {**whole, "parts": sizes})


def load_examples(source: Any, data: Data, events: Events) -> list[Example]:
    """The examples of one source, read as `data` says. Raises DataError as `load_data` does."""
    return _read(source, data, events, Counter())[0]


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """SHA-256 over the contents (ids left out), in order: the same rows in another order are another set."""
    digest = hashlib.sha256()
    for example in examples:
        content = {key: value for key, value in asdict(example).items() if key != "id"}
        digest.update(json.dumps(content, ensure_ascii=False, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _read(source: Any, data: Data, events: Events, dropped: Counter[str]) -> tuple[list[Example], Shape]:
    bad: list[tuple[str, str]] = []
    examples: list[Example] = []
    shape: Shape | None = None
    found: dict[str, str] = {}
    for row in read_rows(source, bad=lambda where, why: bad.append((where, why))):
        if shape is None:
            shape, found = recognise(row, data.columns, data.shape)
        try:
            examples.append(to_example(row, shape, found))
        except DataError as err:
            bad.append((row.where, str(err)))
        if data.limit is not None and len(examples) >= data.limit:
            break
    bad += _check_kinds(examples)
    spoilt = {where for where, _ in bad}
    examples = [example for example in examples if example.id not in spoilt]
    if bad and data.on_bad_row == "refuse":
        shown = "; ".join(f"{where}: {why}" for where, why in bad[:NAMED])
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise DataError(
            f"{len(bad)} of {len(bad) + len(examples)} rows cannot be used: {shown}{more}. "
            "Mend them, or set data.on_bad_row: drop"
        )
    for _, why in bad:
        dropped[why] += 1
    if bad:
        events.warn(
            f"{describe_source(source)}: rows dropped because they cannot be used, {bad[0][0]} first ({bad[0][1]})",
            len(bad),
        )
    if not examples or shape is None:
        raise DataError(
            f"{describe_source(source)}: there are no rows to use" + (f" ({len(bad)} were dropped)" if bad else "")
        )
    return examples, shape


def _check_kinds(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """Rows whose gold is of another kind than most: one label among lists of labels, or the reverse."""
    kinds = Counter(type(example.label) for example in examples if isinstance(example, Labelled))
    if len(kinds) < 2:
        return []
    usual = kinds.most_common(1)[0][0]
    named = {str: "one label", tuple: "a list of labels", float: "a number"}
    return [
        (example.id, f"the label is {named[type(example.label)]}, where most rows have {named[usual]}")
        for example in examples
        if isinstance(example, Labelled) and type(example.label) is not usual
    ]


def _check_labels(train: Sequence[Example], validation: Sequence[Example], test: Sequence[Example]) -> None:
    if not isinstance(train[0], Labelled) or isinstance(train[0].label, float):
        return
    known: set[str] = set()
    for example in train:
        known.update(_labels(example))
    if len(known) < 2:
        raise DataError(
            f"all {len(train)} training rows have the label {next(iter(known), None)!r}; classes take two or more to tell apart"
        )
    for part, examples in (("validation", validation), ("test", test)):
        for example in examples:
            unseen = [label for label in _labels(example) if label not in known]
            if unseen:
                raise DataError(
                    f"{example.id}: the label {unseen[0]!r} occurs in the {part} part but never in training, so it cannot be "
                    "learned; add training rows that have it, or take these rows out"
                )


def _labels(example: Example) -> tuple[str, ...]:
    if not isinstance(example, Labelled) or isinstance(example.label, float) or example.label is None:
        return ()
    return example.label if isinstance(example.label, tuple) else (example.label,)


def _warn_shared(train: Sequence[Example], others: dict[str, list[Example]], events: Events) -> None:
    if not any(others.values()):
        return
    known = {content_key(example) for example in train}
    for part, examples in others.items():
        shared = [example.id for example in examples if content_key(example) in known]
        if shared:
            events.warn(
                f"rows of the {part} part also stand in the training part ({shared[0]} first): its results flatter",
                len(shared),
            )
