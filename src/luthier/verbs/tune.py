"""Tune a model: read the data, learn, judge what was learned beside plain baselines, and keep everything."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from luthier.core.config import Config, Resolved, resolve
from luthier.core.errors import ConfigError, LuthierError, RunError
from luthier.core.events import Events, Sink
from luthier.core.record import Record, now
from luthier.core.run import Run, discard, find_run, read_record
from luthier.core.sizes import Gigabytes
from luthier.data.load import Data
from luthier.data.plans import Order
from luthier.models.adapters import ADAPTERS
from luthier.models.sources import settle
from luthier.training.objectives import OBJECTIVES
from luthier.training.optimizers import OPTIMIZERS
from luthier.training.schedules import SCHEDULES
from luthier.verbs.artefacts import judge, keep_inputs, keep_model
from luthier.verbs.encoding import encode, refer
from luthier.verbs.joining import begin, checkpoints, gather
from luthier.verbs.launch import join_world
from luthier.verbs.reading import read
from luthier.verbs.settings import check
from luthier.verbs.work import Work

if TYPE_CHECKING:
    from luthier.core.types import Encoded
    from luthier.models.spec import LoadedModel
    from luthier.training.forecast import Plan
    from luthier.training.loop import Outcome
    from luthier.training.world import World


class Tune(Config):
    """What to tune, on what, and how. Three lines are enough: model, data, objective."""

    model: str = "mini"
    """A shipped model ("mini"), a hub id, a directory, or run:<id>."""
    data: Data
    """A file, a directory, "sms_spam", hub:owner/name, or a table of settings: train, validation, test, columns, split ..."""
    objective: OBJECTIVES.field_or_auto = "auto"  # type: ignore[name-defined]
    """What to learn: pretrain, sft, distil, dpo, orpo, simpo, kto, reward, grpo, classify, regress, seq2seq, or auto."""
    adapter: ADAPTERS.field = "full"  # type: ignore[name-defined]
    """Which weights learn: full (all), freeze (the last layers and the head), lora, dora or pissa (small matrices)."""
    optimizer: OPTIMIZERS.field = "adamw"  # type: ignore[name-defined]
    """How gradients move weights: adamw, adamw8bit, adam, sgd, adafactor, muon, lion, schedule_free, apollo, galore."""
    schedule: SCHEDULES.field = "linear"  # type: ignore[name-defined]
    """How the learning rate moves: constant, linear, polynomial, cosine, inverse_sqrt, wsd; each with a warm-up."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate."""
    rate_multiplier: float = Field(1.0, gt=0)
    """Times the learning rate that auto chooses."""
    epochs: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Passes over the training rows."""
    steps: int | None = Field(None, gt=0)
    """Optimiser steps; overrides epochs."""
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Rows of one optimiser step."""
    accumulate: int = Field(1, gt=0)
    """Micro-batches that a step is split into at least, to save memory; the result is the same."""
    micro_tokens: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Most tokens that go through the model at once: a step with more is split; the result is the same. auto: what fits."""
    checkpointing: Literal["auto", "none", "layers", "offload"] = "auto"
    """Of a layer keep all that is computed (none), its input and compute the rest again (layers), or its input on the host
    (offload, for a GPU); auto: none if that fits."""
    memory: Gigabytes = "auto"
    """Memory that may be filled, in GB or with a unit (0.5GB, 500MiB); auto: what is free."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 leaves gradients alone."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer below the last learns at this times the rate of the one above it, embeddings least; 1: all alike."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of what learns, such as 0.999, which is then validated and saved; 0: none."""
    noise: float = Field(0.0, ge=0)
    """Strength of noise on the input embeddings while learning (NEFTune's alpha, 5 is usual); 0: none."""
    max_length: int | None = Field(None, gt=1)
    """Longest row in tokens; by default the model's context."""
    truncate: bool = False
    """Cut rows that are too long (and count them) instead of refusing them."""
    template: str = "auto"
    """Chat template: auto (the model's own, else a plain one), own, plain, chatml, raw, or a .jinja file."""
    learn: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are learned."""
    pooling: Literal["auto", "last", "mean", "first"] = "auto"
    """How a classifier or regressor makes one vector of a text."""
    from_scratch: bool = False
    """Start from random weights of the model's shape."""
    quantize: Literal["auto", "none", "int8", "nf4"] = "auto"
    """How the frozen base is held under an adapter such as lora: none, int8 (half of bfloat16), nf4 (a quarter, QLoRA)."""
    validate_every: Annotated[int, Field(gt=0)] | Literal["auto", "epoch"] = "auto"
    """Steps between validations."""
    patience: int = Field(0, ge=0)
    """Stop after so many validations without a better one; 0: never."""
    checkpoint_every: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Steps between checkpoints; auto: as often as takes a twentieth of the time. One is written at the end, and on a signal."""
    by_length: bool = True
    """Put rows of like length into one step, where `order` leaves that open, so that little is padded."""
    order: Order = "shuffled"
    """The order of the rows: shuffled, given (as the data have them), short_first (the first pass goes from short to long),
    competence (over the first half of the run from a growing share of the shortest)."""
    baselines: bool = True
    """Judge plain baselines on the same rows."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; what learns is kept and updated in float32 in either case."""
    seed: int = 0
    """Seed of everything drawn at random."""
    threads: int | None = Field(None, gt=0)
    """Processor threads; by default torch's choice."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda ..."""
    processes: int = Field(1, gt=0)
    """Processes of this machine that learn together, each from its share of every step; torchrun's number under torchrun."""
    sharding: Literal["none", "full"] = "none"
    """What each of several processes holds: the whole model, or its part of weights, gradients and optimiser (FSDP2)."""
    name: str | None = None
    """The run's name; by default the verb and the time."""

    @model_validator(mode="after")
    def _check_averages(self) -> Tune:
        if self.ema and getattr(self.optimizer, "averages", False):
            raise ValueError(f"ema: the optimiser {self.optimizer.kind} averages the weights itself; leave ema at 0")
        return self


def tune(
    asked: Resolved[Tune] | Tune | None = None,
    *,
    sinks: Sequence[Sink] = (),
    resume: str | None = None,
    **settings: Any,
) -> Record:
    """Tune a model and return the run's record.

    `luthier.tune(model=..., data=..., objective=...)` from Python, a Resolved[Tune] from the command line, or
    `resume="run:<id>"` to go on with an interrupted run (with `processes` for another number of them). Under torchrun every
    process makes the same call; the record of all but the first holds no results. Raises LuthierError (ConfigError,
    DataError, ModelError, RunError, TrainingError); KeyboardInterrupt after a checkpoint when it is told to stop.
    """
    if resume == "run:last":
        resume = str(find_run(resume, _tunes))
    return tune_model(_as_resolved(asked, resume, settings), sinks=sinks, resume=resume)[0]


def plan(asked: Resolved[Tune], *, sinks: Sequence[Sink] = ()) -> dict[str, Any]:
    """Everything decided and nothing done: what `--dry-run` prints. Reads the data and loads the model, in one process,
    which plans for as many as are asked for."""
    from luthier.training.world import World

    processes = asked.config.processes
    work = Work(asked, Events(sinks=sinks), world=World(size=processes, local_size=processes))
    check(asked.config)
    read(work)
    encode(work)
    return {
        "settings": {path: {"value": value, "origin": origin} for path, value, origin in work.asked.rows()},
        "choices": work.events.choices,
        "warnings": dict(work.events.warnings),
        **work.numbers(),
        "memory_bytes": {} if work.plan.forecast is None else work.plan.forecast.parts,
        "seconds": work.plan.seconds,
    }


def encode_for(asked: Resolved[Tune], events: Events, *, limit: int) -> tuple[list[Encoded], LoadedModel]:
    """The first `limit` training rows as this tuning would encode them, and the model that would read them."""
    work = Work(asked, events)
    read(work)
    return work.objective.encode(work.dataset.train[:limit], work.model, events)[:limit], work.model


def tune_model(
    asked: Resolved[Tune], *, sinks: Sequence[Sink] = (), resume: str | None = None, model: LoadedModel | None = None
) -> tuple[Record, LoadedModel]:
    """Tune, and return the record and the tuned model. `model` is used as it stands instead of loading one."""
    if model is None:
        # The run may go on when another one is the last.
        asked = replace(asked, config=asked.config.model_copy(update={"model": settle(asked.config.model)}))
    with join_world(asked, resume=resume, given=model is not None) as world, world.guard():
        if not world.leads:
            return _follow(asked, world, resume, model)
        return _lead(asked, world, sinks, resume, model)


def _lead(
    asked: Resolved[Tune], world: World, sinks: Sequence[Sink], resume: str | None, model: LoadedModel | None
) -> tuple[Record, LoadedModel]:
    run = Run.open(resume, sinks) if resume else Run.create("tune", asked, name=asked.config.name, sinks=sinks)
    if resume and run.record.state == "finished":
        raise RunError(
            f"run:{run.id}: this run is finished; to train it further start a new one with --model run:{run.id}"
        )
    world.tell("run", str(run.path.absolute()))
    work = Work(asked, run.events, model, world)
    # What another process died of is what the record says: the guard stands inside.
    with run.working(), world.guard():
        try:
            check(asked.config)
            read(work)
            if resume and run.record.data.get("fingerprint") not in (None, work.dataset.fingerprint):
                raise RunError(
                    f"run:{run.id}: the data changed since this run began, so it cannot go on; start a new run"
                )
            encode(work)
        except (LuthierError, KeyboardInterrupt):
            if not resume:
                discard(run)  # nothing was learned yet
            raise
        try:
            _learn_and_judge(run, work, resume=resume is not None)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"go on with: luthier tune --resume run:{run.id}") from None
    _write_report(run.path)
    return run.record, work.model


def _follow(
    asked: Resolved[Tune], world: World, resume: str | None, model: LoadedModel | None
) -> tuple[Record, LoadedModel]:
    """Take part in a run that another process leads; the record that comes back is not written anywhere."""
    path = Path(world.hear("run"))
    work = Work(asked, Events(), model, world)
    read(work)
    encode(work)
    _learn(path, work, resume=resume is not None)
    return Record(id=path.name, verb="tune", created=now(), state="finished"), work.model


def _learn(path: Path, work: Work, *, resume: bool) -> Outcome:
    """The part of a tuning that all processes do together."""
    from luthier.models.checkpointing import checkpoint_layers
    from luthier.training.loop import train

    refer(work, path)
    begin(work)
    try:
        outcome = train(
            work.model,
            work.objective,
            work.feed,
            work.validation,
            parameters=work.parameters,
            optimizer=work.config.optimizer,
            schedule=work.config.schedule,
            settings=work.settings,
            checkpoints=checkpoints(work, path),
            events=work.events,
            resume=resume,
            scales=work.scales(),
            world=work.world,
            sharded=work.sharded,
            plan=work.plan,
        )
        gather(work)
    finally:
        checkpoint_layers(work.model, "none")
    return outcome


def _learn_and_judge(run: Run, work: Work, *, resume: bool) -> None:
    run.write_config(work.asked)
    keep_inputs(work, run)
    outcome = _learn(run.path, work, resume=resume)
    run.update(
        numbers={
            **run.record.numbers,
            "steps": outcome.progress.step,
            "best_step": outcome.progress.best_step or outcome.progress.step,
            "tokens": outcome.progress.tokens,
            "tokens_per_second": round(outcome.tokens_per_second, 1),
            **_compared(work.plan, outcome),
            "training_seconds": round(run.record.numbers.get("training_seconds", 0.0) + outcome.seconds, 1),
            "stopped_early": outcome.stopped_early,
        },
        data={**run.record.data, **work.drawn(outcome.progress)},
    )
    keep_model(work, run)
    judge(work, run)
    for checkpoint in checkpoints(work, run.path).steps():
        shutil.rmtree(checkpoint, ignore_errors=True)


def _compared(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """What was predicted, beside what it was."""
    found: dict[str, Any] = {"peak_bytes": outcome.peak_bytes}
    if plan.forecast is not None:
        found["predicted_peak_bytes"] = plan.forecast.total
    if plan.seconds is not None:
        found["predicted_seconds"] = float(f"{plan.seconds:.3g}")
    return {name: value for name, value in found.items() if value is not None}


def fine_tune(
    model: Any,
    tokenizer: Any,
    train_data: Any,
    val_data: Any = None,
    *,
    sinks: Sequence[Sink] | None = None,
    **settings: Any,
) -> Any:
    """Tune a loaded model on data given as a path, a list of dicts or strings, or a table; return the tuned module.

    `settings` are those of Tune (learning_rate, epochs, objective, adapter ...). The run's record is at
    `.luthier_record` of the module that comes back, its files in the runs directory.
    """
    from luthier.models.wrap import wrap_model

    loaded = wrap_model(model, tokenizer)
    data = {"train": train_data} if val_data is None else {"train": train_data, "validation": val_data}
    asked = resolve(Tune, values={"model": loaded.spec.source, "data": data, **settings})
    record, tuned = tune_model(asked, sinks=sinks or (), model=loaded)
    for name, value in (("luthier", tuned), ("luthier_record", record)):
        setattr(tuned.module, name, value)
    return tuned.module


def _tunes(path: Path) -> bool:
    return read_record(path).verb == "tune"


def _as_resolved(
    asked: Resolved[Tune] | Tune | None, resume: str | None, settings: Mapping[str, Any]
) -> Resolved[Tune]:
    if resume:
        if asked is not None or settings.keys() - {"processes"}:
            raise ConfigError("--resume goes on with the run exactly as it was asked for; give no other settings")
        return resolve(Tune, file=find_run(resume) / "config.yaml", values=settings)
    if isinstance(asked, Tune):
        return Resolved(asked, dict.fromkeys(asked.model_fields_set, "override"))
    return asked if asked is not None else resolve(Tune, values=settings)


def _write_report(path: Path) -> None:
    from luthier.reporting.page import write_report

    write_report(path)
