"""How much goes through the model at once, and what of it is kept: so that it fits, predicted before the first step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError
from luthier.core.types import Encoded
from luthier.data.cache import lengths_of
from luthier.verbs.largest import answers_of, large_steps, largest_held_out, largest_parts, largest_writing, seen_of

if TYPE_CHECKING:
    from luthier.models.checkpointing import Checkpointing
    from luthier.training.forecast import Plan
    from luthier.verbs.work import Work

# Tokens that go through the model at once where nobody says: more is no faster on a CPU; on a GPU up to MOST may be.
TOKENS, MOST = 8192, 65536
# The share of the memory there is that a forecast may fill.
FILLED = 0.95


def plan_memory(work: Work) -> Plan:
    """The most tokens at once that fit, with nothing computed twice if that fits; said, with what it is predicted to take.

    Of several processes the first decides, and the others hear it. Raises ConfigError where `memory` was given and the
    leanest way does not fit in it.
    """
    world = work.world
    if world.leads:
        world.await_all("loaded")  # what is free counts when all of them hold their model
        plan = _decide(work)
        world.tell("plan", json.dumps([plan.settings.micro_tokens, plan.checkpointing, plan.most]))
        return plan
    from luthier.models.checkpointing import checkpoint_layers
    from luthier.training.forecast import Plan

    world.await_all("loaded")
    tokens, how, most = json.loads(world.hear("plan"))
    checkpoint_layers(work.model, how)
    return Plan(replace(work.settings, micro_tokens=tokens), how, (), (), None, None, most=most)


def _decide(work: Work) -> Plan:
    from luthier.models.checkpointing import checkpoint_layers
    from luthier.models.memory import held_memory, return_freed_memory, shown

    config, events, device = work.config, work.events, work.model.device
    return_freed_memory(device)
    limit = _limit(work)
    steps = large_steps(work)
    leanest: Plan | None = None
    for how in _ways(work):
        if how != "none":
            checkpoint_layers(work.model, how)
        for tokens in _ladder(work, limit):
            plan = _lay_out(work, steps, tokens, how, limit)
            if plan.forecast is None or limit is None or plan.forecast.total <= limit * FILLED:
                return _say(work, plan)
            leanest = min(plan, leanest or plan, key=_total)
            if len(plan.rows) == 1:
                break
    assert leanest is not None and leanest.forecast is not None and limit is not None
    checkpoint_layers(work.model, leanest.checkpointing)
    total = leanest.forecast.total
    if config.memory != "auto":
        checkpoint_layers(work.model, "none")
        # With the share that stays free: what would have to be given.
        needed = _needed(leanest, total / FILLED)
        raise ConfigError(
            f"memory: {shown(limit)} are not enough, {needed} are needed at least, of which {shown(held_memory(device))} are "
            "held already; choose adapter lora, quantize: nf4, a shorter max_length or a smaller model"
        )
    needed = _needed(leanest, total)
    events.warn(
        f"the memory that is free may not be enough: {needed} are predicted, and there are {shown(limit)}; choose adapter "
        "lora, quantize: nf4, a shorter max_length or a smaller model"
    )
    return _say(work, leanest)


def _needed(plan: Plan, size: float) -> str:
    from luthier.models.memory import shown

    assert plan.forecast is not None
    return f"{shown(size)} ({plan.forecast.tokens} tokens at once, checkpointing {plan.checkpointing})"


def _total(plan: Plan) -> int:
    assert plan.forecast is not None
    return plan.forecast.total


def _limit(work: Work) -> int | None:
    """Bytes that this process may hold."""
    from luthier.models.memory import free_memory, held_memory

    if work.config.memory != "auto":
        return int(work.config.memory * 1e9)
    device = work.model.device
    free = free_memory(device)
    if free is None:
        return None
    return held_memory(device) + free // (work.world.local_size if device.type == "cpu" else 1)


def _ways(work: Work) -> list[Checkpointing]:
    if work.config.checkpointing != "auto":
        return [work.config.checkpointing]
    from luthier.models.layers import layers_of

    if next(layers_of(work.model.network), None) is None:
        return ["none"]
    return ["none", "layers"] if work.model.device.type == "cpu" else ["none", "layers", "offload"]


def _ladder(work: Work, limit: int | None) -> Iterator[int]:
    """Tokens at once to try, from the most."""
    if work.config.micro_tokens != "auto":
        yield int(work.config.micro_tokens)
        return
    tokens = TOKENS if work.model.device.type == "cpu" or limit is None else MOST
    while tokens >= 1:
        yield tokens
        tokens //= 2


def _lay_out(
    work: Work, steps: Sequence[Sequence[Encoded]], tokens: int, how: Checkpointing, limit: int | None
) -> Plan:
    from luthier.models.rehearsal import why_not
    from luthier.training.forecast import Plan, foresee

    settings = replace(work.settings, micro_tokens=tokens)
    parts, several = largest_parts(steps, settings, work.world.size)
    held_out = largest_held_out(work, tokens)
    try:
        forecasts = [
            foresee(
                work.model,
                work.objective,
                [parameter for _, parameter in work.parameters],
                work.config.optimizer,
                rows,
                held_out,
                several=several,
                averages=bool(work.config.ema),
                noise=work.config.noise,
                shards=work.world.size if work.shards else 1,
                writing=largest_writing(work),
            )
            for rows in parts
        ]
    except Exception as err:
        work.events.choose("memory", "not predicted", why_not(err))
        return Plan(settings, how, parts[0], held_out, None, limit)
    forecast, rows = max(zip(forecasts, parts), key=lambda one: one[0].total)
    seconds = None
    # How long the rows of a stream are nobody knows, nor how long those that are written between steps.
    if work.dataset.stream is None and not work.objective.draws:
        row = sum(lengths_of(work.rows)) / max(1, len(work.rows))
        share = settings.batch_size / work.world.size
        seconds = settings.steps * share * row / max(1, forecast.tokens) * forecast.seconds
    return Plan(settings, how, rows, held_out, forecast, limit, seconds, forecast.total)


def _say(work: Work, plan: Plan) -> Plan:
    from luthier.engine.native import tell_packed
    from luthier.models.memory import shown

    config, forecast = work.config, plan.forecast
    if config.micro_tokens == "auto":
        usual = plan.settings.micro_tokens == TOKENS and work.model.device.type == "cpu"
        why = "more at once is no faster" if usual else "the most that fits"
        work.advise("micro_tokens", plan.settings.micro_tokens, why, quiet=usual)
    if config.checkpointing == "auto":
        what = "layers are computed again on the way back, or it would not fit"
        why = "everything that is computed fits" if plan.checkpointing == "none" else what
        work.advise("checkpointing", plan.checkpointing, why, quiet=plan.checkpointing == "none")
    if forecast is not None:
        part = {name: shown(size) for name, size in forecast.parts.items()}
        beside = "" if plan.limit is None else f"; {shown(plan.limit)} may be used"
        work.events.choose(
            "memory",
            part["total"],
            f"predicted at most{seen_of(work)}: weights {part['weights']}, all else before the first step "
            f"{part['process']}, fp32 masters {part['masters']}, optimiser {part['optimizer']}, gradients "
            f"{part['gradients']}, activations {part['activations']}, or validation {part['validation']}, or answers "
            f"{part['writing']}{beside}",
        )
        tell_packed(work.model, answers_of(work)[1], work.events)
    if plan.seconds is not None:
        work.events.choose("time", spoken(plan.seconds), "predicted for all steps, without validation")
    return plan


def spoken(seconds: float) -> str:
    """A duration for people: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
