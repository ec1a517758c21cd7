"""A reward for the form of an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from pydantic import field_validator

from luthier.training.rewards.part import Answer, Reward


class Pattern(Reward):
    """1 where the answer matches a regular expression, else 0."""

    kind: ClassVar[str] = "pattern"

    pattern: str
    """A regular expression of Python, found anywhere in the answer; ^ and $ are its ends, (?s) lets . match a new line."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as err:
            raise ValueError(f"{value!r} is no regular expression ({err})") from None
        return value

    def score(self, answers: Sequence[Answer]) -> list[float]:
        found = re.compile(self.pattern)
        return [float(found.search(one.output) is not None) for one in answers]
