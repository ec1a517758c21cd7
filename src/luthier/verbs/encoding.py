"""The second stage of a tuning: rows to tokens, what was left open decided, and what the model says before it learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.types import Encoded
from luthier.data.cache import lengths_of
from luthier.data.feed import Feed, HeldRows, StreamedRows
from luthier.data.plans import Plan as Steps
from luthier.data.preferences import holds_answers
from luthier.verbs.planning import plan_memory
from luthier.verbs.rendering import note_rendering
from luthier.verbs.settings import decide

if TYPE_CHECKING:
    from luthier.verbs.work import Work


def encode(work: Work) -> None:
    """Turn the rows into tokens, and decide everything that was left to us."""
    from luthier.models.packed import shares

    events, dataset = work.events, work.dataset
    events.stage(f"encoding {len(dataset.train)} rows")
    work.rows, work.validation = _encode_part(work, "train"), _encode_part(work, "validation")
    work.rendered = note_rendering(work)
    if work.objective.refers:
        shares(work.model, events)
    work.settings = decide(work)
    work.feed = make_feed(work)
    work.plan = plan_memory(work)
    work.settings = work.plan.settings


def _encode_part(work: Work, part: str) -> Sequence[Encoded]:
    """The rows of the training or the validation part, source by source, each with its source's name."""
    from luthier.training.encoded import encode_once

    found = {
        name: encode_once(f"{part}/{name}", examples, work.objective, work.model, work.world, work.events)
        for name, examples in work.dataset.split_by_source(part).items()
        if examples
    }
    if set(found) <= {""}:
        return found.get("", [])
    return [replace(row, source=name) for name, rows in found.items() for row in rows]


def make_feed(work: Work) -> Feed:
    config, settings, dataset = work.config, work.settings, work.dataset
    steps = math.ceil(settings.steps / work.objective.repeats())
    if dataset.stream is not None:
        return StreamedRows(
            dataset.stream,
            lambda examples, events: work.objective.encode(examples, work.model, events),
            batch_size=settings.batch_size,
            steps=steps,
            seed=config.seed,
            window=config.data.shuffle_buffer,
            shuffled=config.order == "shuffled",
            by_length=config.by_length,
        )
    plan = Steps(
        lengths_of(work.rows),
        settings.batch_size,
        steps,
        config.seed,
        config.order,
        config.by_length,
        [row.source for row in work.rows] if dataset.weights else (),
        dataset.weights,
    )
    return HeldRows(work.rows, plan)


def refer(work: Work, path: Path) -> None:
    """Let the model say of the rows, before it learns, what the objective and the judge will hold against it.

    The first process keeps what it said in the run at `path`, where the others find it.
    """
    keep = path / "reference"
    if not work.world.leads:
        work.world.hear("referred")
        if work.hollow:
            return
    work.rows = work.objective.refer(work.rows, work.model, work.events, keep)
    work.validation = work.objective.refer(work.validation, work.model, work.events, keep)
    work.feed = make_feed(work)
    work.world.tell("referred", "")
    if not work.world.leads:
        return
    held = work.dataset.test or work.dataset.validation
    if holds_answers(held) and work.objective.task is None and (work.objective.refers or work.config.baselines):
        from luthier.evals.preferences import read_answers

        work.events.stage(f"reading {len(held)} held-out rows with the model as it starts")
        work.before = read_answers(work.model, held, work.events, "reference")
