"""What to do where the user wrote "auto": a value and the reason for it, from the task, the model's size and the data."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol, TypeAlias

from luthier.core.types import Chat, Example, Feedback, Labelled, Pair, Preference

Choice: TypeAlias = tuple[Any, str]
"""A value, and why."""


class Suited(Protocol):
    """What an optimiser says of the rate that suits it."""

    kind: ClassVar[str]
    rate_why: ClassVar[str]

    def times(self, values: int) -> float:
        """As a multiple of AdamW's."""


# Objectives that move a tuned model a little: a tenth of the usual rate, few passes.
NUDGES = ("dpo", "kto", "simpo")


def choose_objective(example: Example, kind: str) -> Choice:
    """The objective that fits the rows and the model's kind."""
    if isinstance(example, Labelled):
        if isinstance(example.label, float):
            return "regress", "the rows carry a number"
        return "classify", "the rows carry labels"
    if isinstance(example, Chat):
        return "sft", "the rows are conversations"
    if isinstance(example, Preference):
        return "dpo", "the rows hold a chosen and a rejected answer"
    if isinstance(example, Feedback):
        return "kto", "the rows hold answers that are good or bad"
    if isinstance(example, Pair):
        return (
            ("seq2seq", "the rows are pairs and the model is an encoder-decoder")
            if kind == "encoder-decoder"
            else ("sft", "the rows are pairs")
        )
    return "pretrain", "the rows are plain text"


def choose_learning_rate(parameters: int, adapter: str, objective: str, from_scratch: bool) -> Choice:
    """Peak learning rate for Adam and its kin.

    Full tuning: 5e-5 at 100 M parameters, times (100 M / parameters)^0.5, between 1e-5 and 5e-4. Small models bear and
    need larger steps. LoRA trains well at about ten times that (tinker-cookbook#81), up to 2e-3. From random weights:
    the scale of common recipes, 1e-3 at 100 M, up to 3e-3. DPO, KTO and SimPO take a tenth: 1e-6 for 7 B in full, as in
    their papers.
    """
    if from_scratch:
        rate = min(3e-3, 1e-3 * math.sqrt(1e8 / parameters))
        return _round(rate), f"training {_millions(parameters)} parameters from random weights"
    rate = min(5e-4, max(1e-5, 5e-5 * math.sqrt(1e8 / parameters)))
    if objective in NUDGES:
        rate = rate / 10
    if adapter not in ("full", "freeze"):
        return _round(min(2e-3, rate * 10)), f"ten times the rate of full tuning for {_millions(parameters)} parameters"
    return _round(rate), f"full tuning of {_millions(parameters)} parameters"


def suit_optimizer(rate: float, why: str, optimizer: Suited, values: int) -> Choice:
    """AdamW's `rate` and the reason for it as those of another optimiser, where so many `values` learn."""
    times = optimizer.times(values)
    if times == 1:
        return rate, why
    return _round(rate * times), f"{why}, times {times:.3g} for {optimizer.kind}: {optimizer.rate_why}"


def choose_epochs(rows: int, objective: str) -> Choice:
    """Passes over the data: more when there is little of it; one for plain text."""
    if objective == "pretrain":
        return 1.0, "plain text is read once"
    if objective in NUDGES:
        return (
            (3.0, f"{rows} rows are few")
            if rows < 5_000
            else (1.0, f"preferences are learned in one pass, {rows} rows")
        )
    if rows < 1_000:
        return 10.0, f"{rows} rows are few"
    if rows < 20_000:
        return 4.0, f"{rows} rows"
    return 2.0, f"{rows} rows are many"


def choose_batch_size(rows: int, objective: str) -> Choice:
    """Rows of one optimiser step: 16, fewer when that would leave under 20 steps an epoch."""
    size = 16
    while size > 2 and rows / size < 20:
        size //= 2
    return size, "16 rows a step" if size == 16 else f"{rows} rows, so that an epoch has about 20 steps"


def choose_validation(steps: int, steps_an_epoch: int) -> Choice:
    """Steps between validations: once an epoch, but at least 4 and at most 20 times in all."""
    every = min(steps_an_epoch, max(1, steps // 4))
    every = max(every, math.ceil(steps / 20))
    return every, "once an epoch" if every == steps_an_epoch else f"{math.ceil(steps / every)} times in all"


def _round(rate: float) -> float:
    return float(f"{rate:.1e}")


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M"
