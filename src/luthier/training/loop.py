"""The one training loop. What differs between objectives, adapters and optimisers comes in as arguments."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.core.errors import TrainingError
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.batches import fill_batches, plan_steps, split_step
from luthier.models.spec import LoadedModel
from luthier.training.checkpoint import Checkpoints, Progress, draw_state, read_checkpoint, restore_draws
from luthier.training.masters import Masters
from luthier.training.objectives.part import Objective
from luthier.training.optimizers.part import Optimizer
from luthier.training.schedules.part import Schedule
from luthier.training.tripwires import Watch, check_learning


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, how much at a time, and how often to look. Plain numbers: everything "auto" is decided by now."""

    steps: int
    batch_size: int
    """Rows of one optimiser step."""
    accumulate: int
    """Least number of micro-batches a step is split into; the result does not depend on it."""
    micro_tokens: int
    """Most tokens of a micro-batch; a longer row is one alone."""
    learning_rate: float
    clip: float
    """Largest norm of the gradient; 0 leaves it alone."""
    validate_every: int
    """Steps between validations; 0: only at the end."""
    patience: int
    """Validations without improvement before stopping early; 0: never."""
    checkpoint_every: int
    """Steps between checkpoints beside those at validations; 0: none."""
    by_length: bool
    seed: int


@dataclass(slots=True)
class Outcome:
    """How training ended: progress, why it stopped, and the mean speed."""

    progress: Progress
    stopped_early: bool
    seconds: float
    tokens_per_second: float


# Beyond this many times its start (and at least this much), a loss is not coming back.
DIVERGED = 1000.0


def train(
    model: LoadedModel,
    objective: Objective,
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
    *,
    parameters: Sequence[tuple[str, Parameter]],
    optimizer: Optimizer,
    schedule: Schedule,
    settings: Settings,
    checkpoints: Checkpoints,
    events: Events,
    resume: bool = False,
) -> Outcome:
    """Train `parameters` in place; on return the model holds the best weights seen at a validation.

    Each step sums the loss over its micro-batches and divides once by the weight of the whole step, so accumulation
    changes nothing. With `resume` the newest whole checkpoint is restored: weights, optimiser, random generators and
    place in the data; the run goes on exactly as it would have. SIGINT and SIGTERM finish the step, write a
    checkpoint and raise KeyboardInterrupt. Raises TrainingError on a non-finite or runaway loss.
    """
    check_learning(model, parameters)
    masters = Masters(parameters)
    parameters = masters.parameters
    engine = optimizer.build(parameters, settings.learning_rate)
    progress = Progress()
    if resume:
        progress = _restore(checkpoints, parameters, engine, events) or progress
        masters.publish()
    lengths = [len(row.ids) + len(row.target) for row in rows]
    started, first = time.monotonic(), progress.step
    watch = Watch(parameters)
    tokens_before, stopped_early = progress.tokens, False
    model.module.train()

    def save() -> None:
        state = {"optimizer": engine.state_dict(), "progress": asdict(progress), "draws": draw_state()}
        path = checkpoints.save(f"step-{progress.step:08d}", _weights(parameters), state)
        events.emit("checkpoint", step=progress.step, path=str(path))

    with _watch_signals() as asked_to_stop:
        for plan in _steps_from(progress.step, lengths, settings):
            loss, norm = _step(model, objective, rows, plan, lengths, parameters, engine, schedule, settings, progress)
            masters.publish()
            if progress.step == first:
                watch.check(engine.param_groups[0]["lr"])
            progress.step += 1
            elapsed = time.monotonic() - started
            done = progress.step - first
            events.emit(
                "step",
                step=progress.step,
                steps=settings.steps,
                epoch=round(progress.step * settings.batch_size / len(rows), 4),
                loss=loss,
                learning_rate=engine.param_groups[0]["lr"],
                grad_norm=norm,
                tokens=progress.tokens,
                tokens_per_second=round((progress.tokens - tokens_before) / max(elapsed, 1e-9), 1),
                seconds_left=round(elapsed / done * (settings.steps - progress.step), 1),
            )
            last = progress.step == settings.steps
            due = validation and settings.validate_every and progress.step % settings.validate_every == 0
            if due or (validation and last):
                _look(model, objective, validation, settings, progress, parameters, checkpoints, events)
                stopped_early = bool(settings.patience) and progress.stale >= settings.patience and not last
            periodic = settings.checkpoint_every and progress.step % settings.checkpoint_every == 0
            if due or last or periodic or stopped_early or asked_to_stop():
                save()
            if asked_to_stop() and not last:
                raise KeyboardInterrupt
            if stopped_early:
                events.choose(
                    "stop",
                    f"step {progress.step}",
                    f"no better validation for {settings.patience} in a row; best was step {progress.best_step}",
                )
                break
    seconds = time.monotonic() - started
    if validation and progress.best_step and progress.best_step != progress.step:
        best = read_checkpoint(checkpoints.directory / "best")
        if best is None:
            events.warn(f"the best checkpoint (step {progress.best_step}) cannot be read; the last weights are kept")
        else:
            _load_weights(parameters, best[0])
            masters.publish()
    masters.close()
    model.module.eval()
    return Outcome(progress, stopped_early, seconds, (progress.tokens - tokens_before) / max(seconds, 1e-9))


def _step(
    model: LoadedModel,
    objective: Objective,
    rows: Sequence[Encoded],
    plan: list[int],
    lengths: Sequence[int],
    parameters: Sequence[tuple[str, Parameter]],
    engine: torch.optim.Optimizer,
    schedule: Schedule,
    settings: Settings,
    progress: Progress,
) -> tuple[float, float]:
    """One optimiser step over the rows of `plan`: (mean loss, gradient norm)."""
    micro = [
        objective.batch([rows[at] for at in part], model, (settings.seed, progress.step))
        for part in split_step(plan, lengths, settings.accumulate, settings.micro_tokens)
    ]
    weight = sum(batch.weight for batch in micro)
    factor = schedule.factor(progress.step, settings.steps)
    for group in engine.param_groups:
        group["lr"] = group["base_lr"] * factor
    total = 0.0
    for batch in micro:
        loss, _ = objective.measure(model, batch.to(model.device))
        (loss.sum / weight).backward()
        value = float(loss.sum.detach())
        total += value
        if not math.isfinite(value):
            raise _diverged(f"is {value}", progress.step, batch.names, engine.param_groups[0]["lr"])
    mean = total / weight
    norm = _clip([parameter for _, parameter in parameters], settings.clip)
    names = [name for batch in micro for name in batch.names]
    if not math.isfinite(norm):
        raise _diverged(f"is {mean:.4g} but its gradient is {norm}", progress.step, names, engine.param_groups[0]["lr"])
    if progress.first_loss is None:
        progress.first_loss = mean
    if mean > DIVERGED * max(progress.first_loss, 1.0):
        raise _diverged(
            f"went from {progress.first_loss:.4g} to {mean:.4g}", progress.step, names, engine.param_groups[0]["lr"]
        )
    engine.step()
    engine.zero_grad(set_to_none=True)
    progress.tokens += sum(batch.tokens for batch in micro)
    return mean, norm


def _clip(parameters: Sequence[Parameter], limit: float) -> float:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise TrainingError(
            "no trainable weight received a gradient; the adapter and the objective do not touch each other"
        )
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def _diverged(what: str, step: int, names: Sequence[str], rate: float) -> TrainingError:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return TrainingError(
        f"step {step + 1}: the loss {what}, so training stopped before it spoiled the weights; the rows of this batch: {shown}. "
        f"Lower the learning rate (it is {rate:g}; a tenth is a good next try) or look at these rows"
    )


def _look(
    model: LoadedModel,
    objective: Objective,
    validation: Sequence[Encoded],
    settings: Settings,
    progress: Progress,
    parameters: Sequence[tuple[str, Parameter]],
    checkpoints: Checkpoints,
    events: Events,
) -> None:
    """Validate; keep the weights if they are the best so far."""
    found = validate(model, objective, validation, tokens=settings.micro_tokens)
    name, sign = objective.metric if objective.metric[0] in found else ("loss", -1)
    # A metric of few rows is often equal: then the lower loss is the better model.
    value = (found[name] * sign, -found["loss"])
    better = progress.best_value is None or value > tuple(progress.best_value)
    if better:
        progress.best_value, progress.best_step, progress.stale = value, progress.step, 0
        checkpoints.save("best", _weights(parameters), {"step": progress.step})
    else:
        progress.stale += 1
    progress.history.append({"step": progress.step, **found})
    events.emit("validate", step=progress.step, best=better, judged_by=name, **found)


@torch.no_grad()
def validate(model: LoadedModel, objective: Objective, rows: Sequence[Encoded], *, tokens: int) -> dict[str, float]:
    """Mean loss by weight, and the objective's own metrics. Independent of `tokens`, of which so many go through the
    model at once, but for rounding."""
    training = model.module.training
    model.module.eval()
    total = weight = 0.0
    scores: list[Tensor] = []
    gold: list[Tensor] = []
    try:
        for part in fill_batches([len(row.ids) + len(row.target) for row in rows], tokens):
            batch = objective.batch([rows[at] for at in part], model, (0, 0)).to(model.device)
            loss, seen = objective.measure(model, batch)
            total += float(loss.sum)
            weight += loss.weight
            if seen is not None and batch.gold is not None:
                scores.append(seen.float().cpu())
                gold.append(batch.gold.cpu())
    finally:
        model.module.train(training)
    extra = objective.metrics(torch.cat(scores), torch.cat(gold), model) if scores else {}
    return {"loss": total / weight, **extra}


def _steps_from(step: int, lengths: Sequence[int], settings: Settings) -> Iterator[list[int]]:
    """Row numbers of each step from `step` (from 0) to the last, through as many epochs as that takes."""
    per_epoch = math.ceil(len(lengths) / settings.batch_size)
    while step < settings.steps:
        epoch, skip = divmod(step, per_epoch)
        plans = plan_steps(lengths, settings.batch_size, seed=settings.seed, epoch=epoch, by_length=settings.by_length)
        for plan in plans[skip : skip + settings.steps - step]:
            yield plan
            step += 1


def _weights(parameters: Sequence[tuple[str, Parameter]]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parameters}


def _load_weights(parameters: Sequence[tuple[str, Parameter]], weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(weights[name])


def _restore(
    checkpoints: Checkpoints, parameters: Sequence[tuple[str, Parameter]], engine: torch.optim.Optimizer, events: Events
) -> Progress | None:
    for path, weights, state in checkpoints.newest():
        if weights.keys() != {name for name, _ in parameters}:
            raise TrainingError(
                f"{path}: this checkpoint holds other weights than the ones being trained; was the adapter changed?"
            )
        _load_weights(parameters, weights)
        engine.load_state_dict(state["optimizer"])
        restore_draws(state["draws"])
        events.choose("resume", path.name, "the newest whole checkpoint")
        return Progress(**state["progress"])
    events.choose("resume", "from the start", "the run was stopped before its first checkpoint")
    return None


@contextmanager
def _watch_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag that the loop reads between steps; a second one acts at once."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:
        pass  # not the main thread: signals are somebody else's business
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
