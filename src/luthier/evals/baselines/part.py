"""The Part that a baseline is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from luthier.core.catalog import Part
from luthier.core.types import Example, Labelled, Pair, Prediction


class Baseline(Part):
    """Learns from the training rows in seconds, and answers the held-out ones."""

    kind: ClassVar[str]

    def predict(self, train: Sequence[Example], test: Sequence[Example]) -> list[Prediction]:
        """One prediction for each row of `test`, in order, gold included."""
        raise NotImplementedError(f"{type(self).__name__} must define predict()")


def labelled(examples: Sequence[Example]) -> list[Labelled]:
    """The rows that carry a label or a number."""
    return [example for example in examples if isinstance(example, Labelled)]


def whole_text(example: Labelled) -> str:
    """Both texts of a row on two lines."""
    return example.text if example.pair is None else f"{example.text}\n{example.pair}"


def input_of(example: Example) -> str:
    """What the model would read, for the record."""
    if isinstance(example, Labelled):
        return whole_text(example)
    return example.source if isinstance(example, Pair) else ""
