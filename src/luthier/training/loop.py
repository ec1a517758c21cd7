"""The one training loop. What differs between objectives, adapters and optimisers comes in as arguments."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from torch.nn import Parameter

from luthier.core.errors import TrainingError
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.feed import Feed
from luthier.models.memory import out_of_memory, peak_memory, start_peak
from luthier.models.spec import LoadedModel
from luthier.training.averages import MovingAverage
from luthier.training.ceiling import Ceiling
from luthier.training.checkpoint import Checkpoints, Progress
from luthier.training.draws import draw_state, part_draws, restore_draws
from luthier.training.forecast import Plan
from luthier.training.learner import Learner, Settings
from luthier.training.masters import Masters
from luthier.training.objectives.part import Objective
from luthier.training.optimizers.part import NO_SCALES, Optimizer
from luthier.training.pace import Pace
from luthier.training.probe import probe, worth_probing
from luthier.training.repeats import repeated, take_share
from luthier.training.schedules.part import Schedule
from luthier.training.signals import watch_signals
from luthier.training.step import take_step
from luthier.training.tripwires import Watch, check_learning
from luthier.training.validation import look
from luthier.training.world import ALONE, World

if TYPE_CHECKING:
    from luthier.training.sharding import Sharded


@dataclass(slots=True)
class Outcome:
    """How training ended: progress, why it stopped, and the mean speed."""

    progress: Progress
    stopped_early: bool
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None
    """Most memory held while training; None where the system does not tell."""


def train(
    model: LoadedModel,
    objective: Objective,
    feed: Feed,
    validation: Sequence[Encoded],
    *,
    parameters: Sequence[tuple[str, Parameter]],
    optimizer: Optimizer,
    schedule: Schedule,
    settings: Settings,
    checkpoints: Checkpoints,
    events: Events,
    resume: bool = False,
    scales: Mapping[str, float] = NO_SCALES,
    world: World = ALONE,
    sharded: Sharded | None = None,
    plan: Plan | None = None,
) -> Outcome:
    """Train `parameters` in place; on return the model holds the best weights seen at a validation (of averages,
    where the optimiser or `settings.ema` keeps any). `scales` multiplies the learning rate of a parameter by its name.

    Each step sums the loss over its micro-batches and divides once by the weight of the whole step, so accumulation
    changes nothing. With `resume` the newest whole checkpoint is restored: weights, optimiser, random generators and
    place in the data; the run goes on exactly as it would have. SIGINT and SIGTERM finish the step, write a
    checkpoint and raise KeyboardInterrupt. Raises TrainingError on a non-finite or runaway loss.

    With a `plan` its largest batch is tried before the first step where that is worth its time (`training.probe`).

    In a `world` of several processes each does the same with its share of every step, and all hold the same weights, or
    (`sharded`) each its part of them. A signal to one stops them all after the same step.
    """
    check_learning(model, parameters)
    masters = Masters(parameters)
    try:
        engine = optimizer.build(masters.parameters, settings.learning_rate, scales)
        ema = MovingAverage(masters.parameters, settings.ema) if settings.ema else None
        learner = Learner(
            model, objective, masters.parameters, engine, schedule, settings,
            masters=masters, ema=ema, world=world, sharded=sharded,
        )  # fmt: skip
        if resume:
            _restore(learner, checkpoints, events)
            masters.publish()
        return _learn(learner, feed, validation, checkpoints, events, plan)
    except (RuntimeError, MemoryError) as err:
        if not out_of_memory(err):
            raise
        raise TrainingError(
            "memory ran out; set checkpointing: layers, a shorter max_length, or an optimizer that keeps less (lion, "
            "adamw8bit, adafactor), or choose adapter lora, quantize: nf4 or a smaller model"
        ) from err
    finally:
        masters.close()
        model.module.eval()


def _learn(
    learner: Learner,
    feed: Feed,
    validation: Sequence[Encoded],
    checkpoints: Checkpoints,
    events: Events,
    plan: Plan | None,
) -> Outcome:
    model, objective, world, settings = learner.model, learner.objective, learner.world, learner.settings
    engine, ema = learner.engine, learner.ema
    progress = learner.progress
    watched = start_peak(model.device)
    if plan is not None and worth_probing(plan, learner.sharded is not None):
        probe(learner, plan, events, watched=watched)
    ceiling = Ceiling(model.device, plan)
    pace = Pace(settings.checkpoint_every)
    started, first = time.monotonic(), progress.step
    watch: Watch | None = Watch(learner.parameters)
    tokens_before, stopped_early = progress.tokens, False
    model.module.train()
    repeats = objective.repeats()
    feeding = feed.steps(-(-progress.step // repeats), progress.place, events)

    def save() -> None:
        state = {
            "optimizer": engine.state_dict(),
            "progress": asdict(progress),
            "draws": draw_state(model.device),
            "micro_tokens": learner.settings.micro_tokens,
        }
        if ema is not None:
            state["averages"] = ema.state_dict()
        if progress.step % repeats:
            state["rows"] = world.gather(list(learner.drawn))
        with pace.writing():
            path = checkpoints.save(f"step-{progress.step:08d}", learner.weights(), state)
        events.emit("checkpoint", step=progress.step, path=str(path))

    with watch_signals() as asked_to_stop:
        for rows in feeding if repeats == 1 else repeated(feeding, repeats, progress.step, settings.steps):
            part_draws(world, settings.seed, progress.step)
            loss, norm = take_step(learner, rows, events)
            learner.publish()
            ceiling.keep()
            if watch is not None and (norm > 0 or not objective.idle):
                watch.check(learner.rate, world)
                watch = None
            progress.step += 1
            progress.place = feed.place
            progress.drawn = dict(Counter(progress.drawn) + Counter(row.source for row in rows or () if row.source))
            elapsed = time.monotonic() - started
            done = progress.step - first
            events.emit(
                "step",
                step=progress.step,
                steps=settings.steps,
                epoch=round(progress.step / repeats * settings.batch_size / feed.rows_an_epoch, 4)
                if feed.rows_an_epoch
                else None,
                loss=loss,
                learning_rate=learner.rate,
                grad_norm=norm,
                tokens=progress.tokens,
                tokens_per_second=round((progress.tokens - tokens_before) / max(elapsed, 1e-9), 1),
                seconds_left=round(elapsed / done * (settings.steps - progress.step), 1),
                **({"tally": learner.tally} if learner.tally else {}),
                **({"drawn": dict(progress.drawn)} if progress.drawn else {}),
            )
            last = progress.step == settings.steps
            stop = world.any(asked_to_stop())
            due = validation and settings.validate_every and progress.step % settings.validate_every == 0
            if due or (validation and last):
                look(learner, validation, checkpoints, events)
                stopped_early = bool(settings.patience) and progress.stale >= settings.patience and not last
            if last or stopped_early or stop or world.any(pace.due(progress.step)):
                save()
            if stop and not last:
                raise KeyboardInterrupt
            if stopped_early:
                events.choose(
                    "stop",
                    f"step {progress.step}",
                    f"no better validation for {settings.patience} in a row; best was step {progress.best_step}",
                )
                break
    seconds = time.monotonic() - started
    learner.settle()
    if validation and progress.best_step and progress.best_step != progress.step:
        best = checkpoints.read("best")
        if best is None:
            events.warn(f"the best checkpoint (step {progress.best_step}) cannot be read; the last weights are kept")
        else:
            learner.load(best[0])
            learner.publish()
    speed = (progress.tokens - tokens_before) / max(seconds, 1e-9)
    return Outcome(progress, stopped_early, seconds, speed, peak_memory(model.device) if watched else None)


def _restore(learner: Learner, checkpoints: Checkpoints, events: Events) -> None:
    for path, weights, state in checkpoints.newest():
        if weights.keys() != {name for name, _ in learner.parameters}:
            raise TrainingError(
                f"{path}: this checkpoint holds other weights than the ones being trained; was the adapter changed?"
            )
        learner.load(weights)
        learner.engine.load_state_dict(state["optimizer"])
        if learner.ema is not None:
            learner.ema.load_state_dict(state["averages"])
        restore_draws(state["draws"], learner.model.device)
        learner.progress = Progress(**state["progress"])
        # Another split of a step would add up in another order.
        tokens = state.get("micro_tokens", learner.settings.micro_tokens)
        learner.settings = replace(learner.settings, micro_tokens=tokens)
        learner.drawn = take_share(state["rows"], learner.world) if "rows" in state else ()
        events.choose("resume", path.name, "the newest whole checkpoint")
        return
    events.choose("resume", "from the start", "the run was stopped before its first checkpoint")
