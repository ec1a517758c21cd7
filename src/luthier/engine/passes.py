"""Rows through a model that does not learn, as many at once as memory allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from luthier.core.errors import ModelError
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.batches import Batch, collate, fill_batches
from luthier.data.cache import lengths_of
from luthier.models.memory import (
    free_memory,
    held_memory,
    library_memory,
    out_of_memory,
    return_freed_memory,
    shown,
)
from luthier.models.rehearsal import META, SLACK, as_it_is, rehearse, why_not
from luthier.models.spec import LoadedModel

T = TypeVar("T")
# Tokens that go through the model at once where nobody plans: more is no faster on a CPU; on a GPU up to MOST may be.
TOKENS, MOST = 4096, 32768
# The share of the memory there is that a forecast may fill.
FILLED = 0.95


def run_rows(
    model: LoadedModel,
    rows: Sequence[Encoded],
    compute: Callable[[LoadedModel, Batch], T],
    keep: Callable[[list[int], T], None],
    *,
    tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    events: Events | None = None,
) -> None:
    """`compute` on all rows, those of like length together, in eval mode and without gradients; `keep` takes the places of
    some rows and what came of them.

    `tokens` go through the model at once; where nobody says, with `events` the most that are predicted to fit. Fewer once
    memory has run out, which is said. Raises ModelError where memory runs out at one row.
    """
    if tokens is None:
        tokens = TOKENS if events is None or not rows else plan_tokens(model, rows, compute, events)
    training, done = model.module.training, 0

    def run(part: list[int]) -> None:
        nonlocal done
        keep(part, compute(model, collate([rows[at] for at in part]).to(model.device)))
        done += len(part)
        if on_progress is not None:
            on_progress(done, len(rows))

    model.module.eval()
    try:
        with torch.no_grad():
            each_part(lengths_of(rows), tokens, run, model.device, events)
    finally:
        model.module.train(training)


def each_part(
    lengths: Sequence[int],
    tokens: int,
    run: Callable[[list[int]], None],
    device: torch.device,
    events: Events | None = None,
) -> int:
    """`run` for the rows of these lengths, `tokens` at once; where memory runs out, for the rest with half as many.

    Gives how many that are in the end. `run` must have kept nothing of a part at which it fails. Raises ModelError where memory
    runs out at one row.
    """
    waiting = fill_batches(lengths, tokens)
    while waiting:
        part, short = waiting[0], False
        try:
            run(part)
        except (RuntimeError, MemoryError) as err:
            if not out_of_memory(err):
                raise
            short = True
        if not short:
            waiting.pop(0)
            continue
        return_freed_memory(device)
        size = sum(lengths[at] for at in part)
        if len(part) == 1:
            raise ModelError(
                f"memory ran out with one row of {size} tokens at once; set a shorter max_length, or choose a smaller model "
                "or a machine with more memory"
            )
        tokens = max(max(lengths[at] for at in part), size // 2)
        said = f"memory ran out, so {tokens} tokens go through the model at once from now on; the result is the same"
        if events is not None:
            events.warn(said, 1)
        else:
            warnings.warn(said, stacklevel=2)
        left = [at for one in waiting for at in one]
        waiting = [[left[at] for at in one] for one in fill_batches([lengths[at] for at in left], tokens)]
    return tokens


def plan_tokens(
    model: LoadedModel,
    rows: Sequence[Encoded],
    compute: Callable[[LoadedModel, Batch], object],
    events: Events,
) -> int:
    """The most tokens at once that are predicted to fit into what is free; said, with what they are predicted to take.
    Nothing is computed (`models.rehearsal`)."""
    device = model.device
    held, free = held_memory(device), free_memory(device)
    limit = None if free is None else held + free
    lengths = lengths_of(rows)
    tokens = TOKENS if device.type == "cpu" or limit is None else MOST
    held += library_memory(device, model.network.dtype)
    while True:
        part = max(fill_batches(lengths, tokens), key=lambda part: sum(lengths[at] for at in part))
        try:
            needed = held + _foresee(model, [rows[at] for at in part], compute)
        except Exception as err:
            events.choose("memory of judging", "not predicted", why_not(err))
            return TOKENS
        if limit is None or needed <= limit * FILLED or len(part) == 1:
            break
        tokens //= 2
    there = "" if limit is None else f"; {shown(limit)} may be used"
    events.choose("memory of judging", shown(needed), f"predicted at most, {tokens} tokens at once{there}")
    if limit is not None and needed > limit * FILLED:
        events.warn(f"the memory that is free may not be enough to judge: {shown(needed)} are predicted{there}")
    return tokens


@torch.no_grad()
def _foresee(model: LoadedModel, rows: Sequence[Encoded], compute: Callable[[LoadedModel, Batch], object]) -> int:
    with as_it_is(model, continued=any(row.parents for row in rows)), rehearse([model.module], model.device) as ledger:
        before = ledger.held
        ledger.mark()
        model.module.eval()
        compute(model, collate(rows).to(META))
        return int((ledger.peak - before) * SLACK)
