"""The largest batch of a run, tried before the first step."""

from __future__ import annotations

import time

import torch

from luthier.core.events import Events
from luthier.data.cache import lengths_of
from luthier.models.memory import out_of_memory, peak_memory, shown
from luthier.training.draws import draw_state, restore_draws
from luthier.training.forecast import Plan
from luthier.training.learner import Learner
from luthier.training.noise import noisy_inputs

# A probe is worth its time when the run is at least so many times as long, or may fill so much of the memory.
TIMES, SHARE = 50, 0.5


def worth_probing(plan: Plan, sharded: bool) -> bool:
    """Whether the largest batch is to be tried: in a long run, or one that may not fit; always where nothing could be
    predicted. Not with sharded weights, where the first step is as good, nor in processes that only follow."""
    if sharded or not plan.rows:
        return False
    if plan.forecast is None:
        return True
    long = plan.seconds is None or plan.seconds >= TIMES * plan.forecast.seconds
    return long or (plan.limit is not None and plan.forecast.total > SHARE * plan.limit)


def probe(learner: Learner, plan: Plan, events: Events, *, watched: bool = True) -> None:
    """Take the largest micro-batch forward and back, and the largest batch of held-out rows forward; say what it took: of
    memory where peaks are `watched` from the start of the run.

    Leaves weights, gradients and random generators as they were. Memory that runs out ends it with a warning: the step
    that meets it will halve its micro-batches.
    """
    model, objective, device = learner.model, learner.objective, learner.model.device
    draws, training = draw_state(device), model.module.training
    short, started, seconds = False, time.perf_counter(), 0.0
    try:
        model.module.train()
        batch = objective.batch(plan.rows, model, (0, 0)).to(device)
        with noisy_inputs(model, batch, learner.settings.noise, (0, 0)):
            loss, _ = objective.measure(model, batch)
            (loss.sum * 0).backward()  # type: ignore[no-untyped-call]
        float(loss.sum.detach())
        seconds = time.perf_counter() - started
        if plan.held_out:
            model.module.eval()
            with torch.no_grad():
                objective.measure(model, objective.batch(plan.held_out, model, (0, 0)).to(device))
    except (RuntimeError, MemoryError) as err:
        if not out_of_memory(err):
            raise
        short = True
    finally:
        model.module.train(training)
        restore_draws(draws, device)
    model.module.zero_grad(set_to_none=True)
    learner.engine.zero_grad(set_to_none=True)
    tokens = sum(lengths_of(plan.rows))
    if short:
        events.warn(
            f"memory ran out with {tokens} tokens at once, the largest batch; steps that need it will be halved", 1
        )
        return
    kept = 0 if plan.forecast is None else plan.forecast.optimizer
    predicted = (
        "" if plan.forecast is None else f"; predicted {shown(plan.forecast.total)}, {plan.forecast.seconds:.2g} s"
    )
    events.choose(
        "probe",
        f"{shown(peak_memory(device) + kept)}, {seconds:.2g} s" if watched else f"{seconds:.2g} s",
        f"measured with the largest batch, {tokens} tokens{predicted}",
    )
