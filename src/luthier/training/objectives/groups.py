"""A prompt and the answers written to it as one row, whose tokens weigh what the rewards and the start of training say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core.errors import DataError
from luthier.core.types import Chat, Encoded, Pair, last_answer, prompt_of
from luthier.models.output import at_temperature
from luthier.models.spec import LoadedModel
from luthier.training.objectives.gains import advantages, pull
from luthier.training.reference import Reference, log_probs

if TYPE_CHECKING:
    from luthier.training.objectives.grpo import GRPO


@dataclass(frozen=True, slots=True)
class Prompt(Encoded):
    """A prompt, with what its answer is rewarded by."""

    shown: str = ""
    gold_answer: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group(Encoded):
    """A prompt and the answers written to it, as segments; the weight of a token is what its likelihood should gain."""

    count: float = 0.0
    """What it adds to the weight of its batch."""
    value: float = 0.0
    """Its part of the loss."""
    tally: dict[str, float] = field(default_factory=dict)
    """Means over its answers, for the numbers of the step."""
    told: tuple[tuple[float, float, float], ...] = ()
    """Where several steps learn from it, of each token: the advantage of its answer, log p when it was written, and log p
    at the start of training; the weights are then what tokens count."""


def read_prompt(example: Chat | Pair, model: LoadedModel) -> Prompt:
    """The prompt of a row, in the model's tokens. Raises DataError, with the row's id, where it leaves no room."""
    said, tools = prompt_of(example)
    if isinstance(example, Pair):
        shown, gold = example.source, example.target
    else:
        last = last_answer(example)
        shown = "\n".join(f"{turn.role}: {turn.content}" for turn in example.messages[:last])
        gold = example.messages[last].content
    try:
        ids = model.renderer.prompt(said, tools)
    except DataError as err:
        raise DataError(f"{example.id}: {err}") from None
    return Prompt(example.id, ids, (0.0,) * len(ids), shown=shown, gold_answer=gold, meta=example.meta)


def form_group(how: GRPO, row: Encoded, answers: Sequence[Sequence[int]], each: dict[str, list[float]]) -> Group:
    """A prompt with its answers, `each` of which got a reward and other numbers."""
    lengths = [len(ids) for ids in answers]
    gains = advantages(each["reward"], how.standardise)
    signal = any(gains)
    group = Group(
        row.id,
        row.ids,
        (0.0,) * len(row.ids),
        segments=(len(row.ids),),
        parents=(-1,),
        count=float(sum(lengths) if how.average == "tokens" else len(answers)),
        tally={name: fmean(values) for name, values in each.items()} | {"no_signal": float(not signal)},
    )
    if not signal and not how.beta:
        return group  # the prompt alone stands for answers that teach nothing: they count in the mean all the same
    if how.updates > 1:
        group = replace(
            group, told=tuple((gain, 0.0, 0.0) for gain, length in zip(gains, lengths) for _ in range(length))
        )
    shares = _shares(how, lengths)
    gained = [share * gain for share, gain, length in zip(shares, gains, lengths) for _ in range(length)]
    return replace(
        group,
        ids=(*row.ids, *(token for ids in answers for token in ids)),
        weights=(*group.weights, *gained),
        segments=(len(row.ids), *lengths),
        parents=(-1, *[0] * len(answers)),
        value=-sum(gained),
    )


def hold(how: GRPO, groups: Sequence[Group], model: LoadedModel, reference: Reference | None) -> list[Group]:
    """The groups with the pull towards the start of training in the weights of their tokens."""
    held = []
    for group, (now_T, start_T) in zip(groups, _read(how, groups, model, reference), strict=True):
        first, lengths = group.segments[0], group.segments[1:]
        shares_T = np.repeat(_shares(how, lengths), lengths)
        change_T, kl_T = pull(now_T, start_T)
        weights = np.array(group.weights)
        weights[first:] += how.beta * shares_T * change_T
        held.append(
            replace(
                group,
                weights=tuple(weights.tolist()),
                value=group.value + how.beta * float((shares_T * kl_T).sum()),
                tally=group.tally | {"kl": float(kl_T.mean())},
            )
        )
    return held


def remember(how: GRPO, groups: Sequence[Group], model: LoadedModel, reference: Reference | None) -> list[Group]:
    """The groups with what the model as it is, and as it was at the start, says of their tokens."""
    held = []
    for group, (written_T, start_T) in zip(groups, _read(how, groups, model, reference), strict=True):
        first, lengths = group.segments[0], group.segments[1:]
        shares_T = np.repeat(_shares(how, lengths), lengths)
        gains = [gain for gain, _, _ in group.told]
        told = zip(gains, written_T.tolist(), start_T.tolist(), strict=True)
        kl = {"kl": float(pull(written_T, start_T)[1].mean())} if how.beta else {}
        held.append(
            replace(
                group,
                weights=(0.0,) * first + tuple(shares_T.tolist()),
                told=((0.0, 0.0, 0.0),) * first + tuple(told),
                tally=group.tally | kl,
            )
        )
    return held


def _read(
    how: GRPO, groups: Sequence[Group], model: LoadedModel, reference: Reference | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For the answers of each group log p of every token, now and at the start; now twice where nothing is held to it."""
    head = partial(at_temperature, temperature=how.temperature)
    now = start = log_probs(model, groups, head)
    if how.beta:
        assert reference is not None  # keep_start() comes first
        with reference.active():
            start = log_probs(model, groups, head)
    firsts = [group.segments[0] for group in groups]
    return [(one_N[first:], other_N[first:]) for first, one_N, other_N in zip(firsts, now, start)]


def _shares(how: GRPO, lengths: Sequence[int]) -> list[float]:
    """What each token of an answer counts."""
    if how.average == "answers":
        return [1 / length for length in lengths]
    return [1.0 if how.average == "tokens" else 1 / how.max_tokens] * len(lengths)
