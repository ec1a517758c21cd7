"""From what was asked to examples in parts: read, map, check, split."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from luthier.core.config import Config
from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Example, Labelled
from luthier.data.mix import Source, is_several, list_sources, read_example, weights_of
from luthier.data.plans import Weight
from luthier.data.profile import profile_examples
from luthier.data.shapes import Columns, Shape, recognise
from luthier.data.sources import describe_source, read_rows
from luthier.data.sources.streams import START, stream_rows
from luthier.data.split import Split, content_key, split_examples
from luthier.data.stream import Stream, flow_of

# How many bad rows an error names before it only counts.
NAMED = 5


class Data(Config):
    """Where the rows are and how to read them. A path alone means `train`."""

    train: Any
    """A file, a directory, "sms_spam", hub:owner/name, a list or table of rows, or a list of several sources: paths, or
    tables of source, weight, columns, shape and name."""
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
    stream: bool = False
    """Read training rows as they come, again and again, instead of all before the first step; goes with `steps`."""
    shuffle_buffer: int = Field(1000, gt=0)
    """With stream: rows that are shuffled (and packed) together, and rows of each source that are looked at beforehand."""

    @model_validator(mode="before")
    @classmethod
    def _accept_source(cls, value: Any) -> Any:
        return value if isinstance(value, dict | Data) else {"train": value}

    @field_validator("train", "validation", "test")
    @classmethod
    def _list_sources(cls, value: Any) -> Any:
        return list_sources(value)

    @model_validator(mode="after")
    def _check_weights(self) -> Data:
        if weights_of(self.validation) or weights_of(self.test):
            raise ValueError("weights mix the training rows; leave them out of validation and test")
        return self

    @field_serializer("train", "validation", "test")
    def _describe(self, source: Any) -> Any:
        if is_several(source):
            return [one.model_dump(mode="json", exclude_none=True) for one in source]
        return None if source is None else describe_source(source)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples in their parts, with what is worth recording of them."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    shape: str
    """The shape of the rows; several, where sources differ."""
    fingerprint: str
    """SHA-256 over the contents of all parts, in order."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    profile: dict[str, Any] = field(default_factory=dict)
    """`profile_examples` of all rows together, and the rows of each part."""
    by_source: dict[str, dict[str, list[Example]]] = field(default_factory=dict)
    """For the training and the validation part the rows of each source, where there are several."""
    weights: dict[str, Weight] = field(default_factory=dict)
    """How sources are mixed for training; empty: each row once a pass."""
    stream: Stream | None = None
    """Where training rows come from when they are not all read; `train` then holds those at the start of each source."""

    def split_by_source(self, part: str) -> dict[str, list[Example]]:
        """The rows of the "train" or the "validation" part by the name of their source; "" where it has none."""
        rows = self.train if part == "train" else self.validation
        return self.by_source.get(part) or ({"": rows} if rows else {})


@dataclass(frozen=True, slots=True)
class Read:
    """What one source held, and how it was read."""

    source: Source
    examples: list[Example]
    shape: Shape
    columns: dict[str, str]


def load_data(data: Data, events: Events) -> Dataset:
    """Read every source, and hold out what was not given.

    Raises DataError: a source that is missing or empty, bad rows (unless they are to be dropped), only one class, a
    label that occurs in validation or test alone. Rows that stand in two given parts are a counted warning.
    """
    dropped: Counter[str] = Counter()
    sources = _read(data.train, data, events, dropped, data.shuffle_buffer if data.stream else None)
    train = _join(sources)
    validation = _read(data.validation, data, events, dropped) if data.validation is not None else []
    test = _join(_read(data.test, data, events, dropped)) if data.test is not None else []
    owners = {
        id(row): str(one.source.name) for one in (*sources, *validation) if one.source.name for row in one.examples
    }
    held = _join(validation)
    whole = profile_examples([*train, *held, *test])
    fingerprint = fingerprint_examples([*train, *held, *test])
    shares = {}
    if data.validation is None and data.split.validation > 0:
        shares["validation"] = data.split.validation
    if data.test is None and data.split.test > 0:
        shares["test"] = data.split.test
    _warn_shared(train, {"validation": held, "test": test}, events)
    stream = None
    if data.stream:
        flows = [flow_of(one.source, one.shape, one.columns, one.examples) for one in sources]
        drop = data.on_bad_row == "drop"
        stream = Stream(flows, weights_of(data.train), by=data.split.by, limit=data.limit, drop=drop)
    if shares:
        read = train
        parts = split_examples(train, data.split, shares, [owners.get(id(row), "") for row in train])
        train, held, test = parts.train, parts.validation or held, parts.test or test
        if not train or (weights_of(data.train) and len({owners[id(row)] for row in train}) < len(sources)):
            raise DataError(
                f"{_describe(data.train)}: {whole['rows']} rows are too few to hold any out; set data.split.validation: 0"
            )
        if stream is not None:
            chosen = {id(row) for row in train}
            stream.hold_out([row for row in read if id(row) not in chosen])
    _check_labels(train, held, test)
    if whole["duplicates"]:
        events.choose(
            "duplicates",
            whole["duplicates"],
            "rows repeat an earlier one; equal rows are kept on one side of the split",
        )
    if stream is not None:
        events.choose(
            "stream",
            f"{sum(len(one.examples) for one in sources)} rows looked at",
            "what is asked of whole data (labels, scores, profile, duplicates, fingerprint, held-out rows, baselines) is "
            "asked of the first rows of each source",
        )
    sizes = {"train": len(train), "validation": len(held), "test": len(test)}
    return Dataset(
        train,
        held,
        test,
        ", ".join(dict.fromkeys(one.shape for one in sources)),
        fingerprint,
        dict(dropped),
        {**whole, "parts": sizes},
        {"train": _group(train, owners), "validation": _group(held, owners)} if owners else {},
        weights_of(data.train),
        stream,
    )


def load_examples(source: Any, data: Data, events: Events) -> list[Example]:
    """The examples of one source, read as `data` says. Raises DataError as `load_data` does."""
    return _join(_read(list_sources(source), data, events, Counter()))


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """SHA-256 over the contents (ids left out), in order: the same rows in another order are another set."""
    digest = hashlib.sha256()
    for example in examples:
        content = {key: value for key, value in asdict(example).items() if key != "id"}
        digest.update(json.dumps(content, ensure_ascii=False, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _read(value: Any, data: Data, events: Events, dropped: Counter[str], most: int | None = None) -> list[Read]:
    """Every source of `value`: the rows of each, named after it where there are several; `most` of them, as they come."""
    sources = value if is_several(value) else [Source(source=value)]
    found = [_read_one(source, data, events, dropped, most) for source in sources]
    bad = _check_kinds(_join(found)) if len(found) > 1 else []
    if bad:
        raise DataError(f"{bad[0][0]}: {bad[0][1]}; sources that are learned together have golds of one kind")
    return found


def _join(found: Sequence[Read]) -> list[Example]:
    return [example for one in found for example in one.examples]


def _group(examples: Sequence[Example], owners: dict[int, str]) -> dict[str, list[Example]]:
    grouped: dict[str, list[Example]] = {}
    for example in examples:
        grouped.setdefault(owners.get(id(example), ""), []).append(example)
    return grouped


def _describe(value: Any) -> str:
    return ", ".join(str(one.name) for one in value) if is_several(value) else describe_source(value)


def _read_one(source: Source, data: Data, events: Events, dropped: Counter[str], most: int | None) -> Read:
    bad: list[tuple[str, str]] = []
    examples: list[Example] = []
    shape: Shape | None = None
    found: dict[str, str] = {}

    def note(where: str, why: str) -> None:
        bad.append((where, why))

    limit = min((one for one in (data.limit, most) if one is not None), default=None)
    rows = read_rows(source.source, bad=note)
    if most is not None:
        rows = (row for row, _ in stream_rows(source.source, START, note))
    for row in rows:
        if shape is None:
            shape, found = recognise(row, source.columns or data.columns, source.shape or data.shape)
        try:
            examples.append(read_example(row, shape, found, source))
        except DataError as err:
            bad.append((row.where, str(err)))
        if limit is not None and len(examples) >= limit:
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
            f"{describe_source(source.source)}: rows dropped because they cannot be used, {bad[0][0]} first ({bad[0][1]})",
            len(bad),
        )
    if not examples or shape is None:
        raise DataError(
            f"{describe_source(source.source)}: there are no rows to use"
            + (f" ({len(bad)} were dropped)" if bad else "")
        )
    return Read(source, examples, shape, found)


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
