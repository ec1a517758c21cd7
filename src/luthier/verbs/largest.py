"""The largest of a run: what of its plan takes the most memory at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from luthier.core.types import Encoded
from luthier.data.batches import deal, fill_batches, split_step
from luthier.data.cache import lengths_of
from luthier.data.feed import HeldRows

if TYPE_CHECKING:
    from luthier.training.learner import Settings
    from luthier.verbs.work import Work

# Steps of a plan that are looked at, and of these how many with the most tokens are laid out.
LOOKED, LAID_OUT = 50_000, 4


def large_steps(work: Work) -> list[Sequence[Encoded]]:
    """The rows of the steps with the most tokens, and of the one with the longest row, as they are learned from."""
    lengths = np.asarray(lengths_of(work.rows))
    if isinstance(work.feed, HeldRows):
        steps = list(islice(work.feed.plan.steps_from(0), LOOKED))
    else:
        longest = np.argsort(-lengths, kind="stable")[: work.settings.batch_size]
        steps = [longest.tolist()]
    totals = [int(lengths[step].sum()) for step in steps]
    most = sorted(range(len(steps)), key=lambda at: -totals[at])[:LAID_OUT]
    most.append(max(range(len(steps)), key=lambda at: int(lengths[steps[at]].max())))
    return [work.objective.stand_in([work.rows[row] for row in steps[at]], work.model) for at in dict.fromkeys(most)]


def seen_of(work: Work) -> str:
    """Of how much of the run the largest is known, where that is not all of it."""
    if not isinstance(work.feed, HeldRows):
        return f" from the first {len(work.rows)} rows of the stream"
    return f" from the first {LOOKED} steps" if work.settings.steps > LOOKED else ""


def largest_parts(
    steps: Sequence[Sequence[Encoded]], settings: Settings, processes: int
) -> tuple[list[Sequence[Encoded]], bool]:
    """The rows of the largest micro-batch of `steps`, and whether its step has others. Rows with a source and an answer are
    padded to the longest of each, so that others may be larger: the most padded tokens, and the most pairs of them."""
    largest: dict[str, tuple[tuple[int, ...], Sequence[Encoded]]] = {}
    several = False
    for rows in steps:
        sizes = lengths_of(rows)
        for hand in deal(sizes, processes):
            if not hand:
                continue
            held = [sizes[row] for row in hand]
            parts = split_step(range(len(hand)), held, -(-settings.accumulate // processes), settings.micro_tokens)
            several = several or len(parts) > 1
            for part in parts:
                found = [rows[hand[at]] for at in part]
                for name, weight in _weights(found).items():
                    if name not in largest or weight > largest[name][0]:
                        largest[name] = weight, found
    chosen = [found for _, found in largest.values()]
    return [one for at, one in enumerate(chosen) if one not in chosen[:at]] or [[]], several


def _weights(rows: Sequence[Encoded]) -> dict[str, tuple[int, ...]]:
    """How large a micro-batch is, by what may be largest of it."""
    sizes = [len(row.ids) + len(row.target) for row in rows]
    found: dict[str, tuple[int, ...]] = {"tokens": (sum(sizes), sum(size**2 for size in sizes))}
    if any(row.target for row in rows):
        source, answer = max(len(row.ids) for row in rows), max(len(row.target) for row in rows)
        found["padded"] = (len(rows) * (source + answer),)
        found["pairs"] = (len(rows) * (source**2 + answer**2 + source * answer),)
    return found


def largest_held_out(work: Work, tokens: int) -> Sequence[Encoded]:
    """The rows of the largest batch of a validation with `tokens` at once."""
    from luthier.training.objectives.part import Objective

    if not work.validation or type(work.objective).examine is not Objective.examine:
        return ()
    lengths = lengths_of(work.validation)
    part = max(fill_batches(lengths, tokens), key=lambda part: sum(lengths[at] for at in part))
    return [work.validation[at] for at in part]


def largest_writing(work: Work) -> int:
    """Bytes that the most answers written at once take, between steps or in a validation: of keys and values, and of packed
    weights; of an encoder-decoder of weights that are laid out once more."""
    from luthier.engine.native import packed_bytes
    from luthier.engine.readers import writes_side_by_side
    from luthier.models.prepared import copied

    if work.objective.draws and work.model.spec.task == "seq2seq" and writes_side_by_side(work.model):
        return copied(work.model)
    tokens, written = answers_of(work)
    return tokens * int(work.model.pages or 0) + packed_bytes(work.model, written)


def answers_of(work: Work) -> tuple[int, int]:
    """Of the answers that are written at once, at most: tokens that are kept, prompts included, and tokens that are written."""
    from luthier.engine.generate import room_for
    from luthier.engine.rollouts import AT_ONCE
    from luthier.models.pages import writes_by_pages

    if not work.objective.draws or not writes_by_pages(work.model):
        return 0, 0
    tokens, written = 0, 0
    share = -(-work.settings.batch_size // work.world.size)
    for rows, most in ((work.rows, share), (work.validation, AT_ONCE)):
        lengths = np.asarray(lengths_of(rows))
        longest = np.argsort(-lengths, kind="stable")[:most]
        before, more = work.objective.prompts([rows[int(at)] for at in longest])
        tokens = max(tokens, room_for(work.model, before, more, AT_ONCE) if before else 0)
        # A validation writes for all its rows, AT_ONCE of them at a time.
        written = max(
            written,
            more * len(before) * (len(rows) if rows is work.validation else len(longest)) // max(1, len(longest)),
        )
    return tokens, written
