"""Answers as rows: how one is shown, and the file that they are added to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError, DataError
from luthier.core.types import Completion, Prediction, TokenLog


def as_answer(found: Completion) -> dict[str, Any]:
    """What is told of an answer that was written, with the others to its prompt."""
    answer: dict[str, Any] = {"output": found.text, "finish": found.finish, "tokens": len(found.ids)}
    if found.logprobs is not None:
        answer["logprobs"] = [_as_log(one) for one in found.logprobs]
    if found.prompt_logprobs is not None:
        answer["prompt_logprobs"] = list(found.prompt_logprobs)
    if found.drafted:
        answer["guessed"] = {"drafted": found.drafted, "accepted": found.accepted}
    if found.others:
        answer["others"] = [as_answer(one) for one in found.others]
    return answer


def take_guesses(answers: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """How many tokens of these answers and their others were guessed, and how many right, which is then told of none of them: it
    follows from how fast the machine was, and the same rows are to give the same file."""
    drafted = accepted = 0
    for one in answers:
        own = one.pop("guessed", {"drafted": 0, "accepted": 0})
        others = take_guesses(one.get("others", ()))
        drafted, accepted = drafted + own["drafted"] + others[0], accepted + own["accepted"] + others[1]
    return drafted, accepted


def _as_log(log: TokenLog) -> dict[str, Any]:
    """JSON has no infinity: what could not come is null. What a server does not tell is left out."""
    known = {"raw": log.raw, **({} if log.processed is None else {"processed": log.processed})}
    shares = {name: None if value == -math.inf else value for name, value in known.items()}
    return {"id": log.id, "text": log.text, **shares, **({"top": [_as_log(one) for one in log.top]} if log.top else {})}


def as_row(name: str, found: Prediction) -> dict[str, Any]:
    """What is told of a prediction: its output, and the probability of each class where there are classes."""
    row = {"id": name, **{key: value for key, value in asdict(found).items() if key in ("output", "probabilities")}}
    return row if row["probabilities"] is not None else {key: row[key] for key in ("id", "output")}


def append_rows(path: Path, answers: Sequence[dict[str, Any]]) -> None:
    """Add a line for each answer. Raises ConfigError where the file cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in answers)
    except OSError as err:
        raise ConfigError(
            f"output: {path} cannot be written ({err.strerror}); choose another file, or make room: the same command "
            "goes on after the answers that stand there"
        ) from None


def read_done(path: Path) -> set[str]:
    """Ids of the answers in `path`. A last line that a crash left unfinished is taken off."""
    if not path.is_file():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    done = set()
    for number, line in enumerate(_lines(whole), 1):
        try:
            done.add(str(json.loads(line)["id"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DataError(
                f"{path}:{number}: this is no line of answers; give another --output, or remove the file"
            ) from None
    return done


def _lines(content: bytes) -> Iterator[str]:
    yield from (line for line in content.decode("utf-8").split("\n") if line.strip())
