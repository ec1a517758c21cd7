"""Tables of questions and answers, a row a section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.core.config import Config
from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.data.sources.files import read_file
from luthier.retrieval.passage import Section

QUESTIONS = ("question", "questions", "q", "query", "prompt", "instruction", "问题", "问", "提问", "标准问题")
ANSWERS = (
    "answer",
    "answers",
    "a",
    "response",
    "reply",
    "completion",
    "output",
    "答案",
    "回答",
    "答",
    "回复",
    "标准答案",
)


class Columns(Config):
    """Which columns of a table hold a question and its answer; by default they are found by their names."""

    question: str | None = None
    """The column of the question."""
    answer: str | None = None
    """The column of the answer."""


def read_questions(path: Path, columns: Columns, events: Events) -> list[Section]:
    """The rows of a csv, tsv, json, jsonl or parquet file with a question and an answer; rows that lack one or cannot be read
    are counted. Raises DataError for a file without such columns."""
    bad: list[str] = []
    sections: list[Section] = []
    start = 0
    names: tuple[str, str] | None = None
    for row in read_file(path, lambda where, why: bad.append(f"{where}: {why}")):
        if names is None:
            names = _find(path, columns, list(row.values))
        question, answer = (_as_text(row.values.get(name)) for name in names)
        if not question or not answer:
            bad.append(f"{row.where}: the question or the answer is empty")
            continue
        number = row.where.rpartition(":")[2]
        sections.append(Section(answer, start, line=int(number) if number.isdigit() else None, question=question))
        start += len(answer) + 1
    if bad:
        events.warn(f"{path.name}: rows are left out; {bad[0]}", len(bad))
    return sections


def _find(path: Path, columns: Columns, names: Sequence[str]) -> tuple[str, str]:
    """The columns of question and answer."""
    found = []
    for what, asked, known in (("question", columns.question, QUESTIONS), ("answer", columns.answer, ANSWERS)):
        by_name = {name.strip().casefold(): name for name in reversed(names)}
        name = asked if asked in names else None
        if asked is None:
            name = next((by_name[one] for one in known if one in by_name), None)
        if name is None:
            raise DataError(
                f"{path}: no column of the {what} among {', '.join(map(str, names)) or 'none'}; name it with --set "
                f"columns.{what}=NAME"
            )
        found.append(name)
    return found[0], found[1]


def _as_text(value: object) -> str:
    """A cell as text; of several answers (SQuAD's lists) the first."""
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, list | tuple):
        return _as_text(value[0]) if value else ""
    return "" if value is None else str(value).strip()
