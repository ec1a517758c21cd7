"""Tune a model: read the data, learn, judge what was learned beside plain baselines, and keep everything."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from luthier.choice import defaults
from luthier.core.config import Config, Resolved, resolve
from luthier.core.errors import ConfigError, LuthierError, RunError, TrainingError
from luthier.core.events import Events, Sink
from luthier.core.record import Record
from luthier.core.run import Run, discard, find_run, write_rows
from luthier.data.load import Data, Dataset, load_data
from luthier.models.adapters import ADAPTERS
from luthier.training.objectives import OBJECTIVES
from luthier.training.optimizers import OPTIMIZERS
from luthier.training.schedules import SCHEDULES

if TYPE_CHECKING:
    from luthier.core.types import Encoded
    from luthier.models.spec import LoadedModel
    from luthier.training.loop import Settings
    from luthier.training.objectives.part import Objective


class Tune(Config):
    """What to tune, on what, and how. Three lines are enough: model, data, objective."""

    model: str = "mini"
    """A shipped model ("mini"), a hub id, a directory, or run:<id>."""
    data: Data
    """A file, a directory, "sms_spam", hub:owner/name, or a table of settings: train, validation, test, columns, split ..."""
    objective: OBJECTIVES.field_or_auto = "auto"  # type: ignore[name-defined]
    """What to learn: pretrain, sft, classify, regress, seq2seq, or auto (by the shape of the rows)."""
    adapter: ADAPTERS.field = "full"  # type: ignore[name-defined]
    """Which weights learn: full (all), freeze (the last layers and the head), lora (small matrices beside the weights)."""
    optimizer: OPTIMIZERS.field = "adamw"  # type: ignore[name-defined]
    """How gradients move weights: sgd, adam, adamw, adafactor, muon."""
    schedule: SCHEDULES.field = "linear"  # type: ignore[name-defined]
    """How the learning rate moves: constant, linear, cosine, wsd; each with a warm-up."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate."""
    epochs: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Passes over the training rows."""
    steps: int | None = Field(None, gt=0)
    """Optimiser steps; overrides epochs."""
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Rows of one optimiser step."""
    accumulate: int = Field(1, gt=0)
    """Micro-batches that a step is split into at least, to save memory; the result is the same."""
    micro_tokens: int = Field(8192, gt=0)
    """Most tokens that go through the model at once: a step with more is split; the result is the same."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 leaves gradients alone."""
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
    validate_every: Annotated[int, Field(gt=0)] | Literal["auto", "epoch"] = "auto"
    """Steps between validations."""
    patience: int = Field(0, ge=0)
    """Stop after so many validations without a better one; 0: never."""
    checkpoint_every: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Steps between checkpoints, beside one at every validation."""
    by_length: bool = True
    """Put rows of like length into one step, so that little is padded."""
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
    name: str | None = None
    """The run's name; by default the verb and the time."""


def tune(
    asked: Resolved[Tune] | Tune | None = None,
    *,
    sinks: Sequence[Sink] = (),
    resume: str | None = None,
    **settings: Any,
) -> Record:
    """Tune a model and return the run's record.

    `luthier.tune(model=..., data=..., objective=...)` from Python, a Resolved[Tune] from the command line, or
    `resume="run:<id>"` to go on with an interrupted run. Raises LuthierError (ConfigError, DataError, ModelError,
    RunError, TrainingError); KeyboardInterrupt after a checkpoint when it is told to stop.
    """
    return tune_model(_as_resolved(asked, resume, settings), sinks=sinks, resume=resume)[0]


def plan(asked: Resolved[Tune], *, sinks: Sequence[Sink] = ()) -> dict[str, Any]:
    """Everything decided and nothing done: what `--dry-run` prints. Reads the data and loads the model."""
    work = _Work(asked, Events(sinks=sinks))
    work.read()
    work.encode()
    return {
        "settings": {path: {"value": value, "origin": origin} for path, value, origin in work.asked.rows()},
        "choices": work.events.choices,
        "warnings": dict(work.events.warnings),
        **work.numbers(),
        "memory_bytes": work.estimate_memory(),
    }


def encode_for(asked: Resolved[Tune], events: Events, *, limit: int) -> tuple[list[Encoded], LoadedModel]:
    """The first `limit` training rows as this tuning would encode them, and the model that would read them."""
    work = _Work(asked, events)
    work.read()
    return work.objective.encode(work.dataset.train[:limit], work.model, events)[:limit], work.model


def tune_model(
    asked: Resolved[Tune], *, sinks: Sequence[Sink] = (), resume: str | None = None, model: LoadedModel | None = None
) -> tuple[Record, LoadedModel]:
    """Tune, and return the record and the tuned model. `model` is used as it stands instead of loading one."""
    run = Run.open(resume, sinks) if resume else Run.create("tune", asked, name=asked.config.name, sinks=sinks)
    if resume and run.record.state == "finished":
        raise RunError(
            f"run:{run.id}: this run is finished; to train it further start a new one with --model run:{run.id}"
        )
    work = _Work(asked, run.events, model)
    with run.working():
        try:
            work.read()
            if resume and run.record.data.get("fingerprint") not in (None, work.dataset.fingerprint):
                raise RunError(
                    f"run:{run.id}: the data changed since this run began, so it cannot go on; start a new run"
                )
            work.encode()
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


def _learn_and_judge(run: Run, work: _Work, *, resume: bool) -> None:
    from luthier.training.checkpoint import Checkpoints
    from luthier.training.loop import train

    run.write_config(work.asked)
    work.keep_inputs(run)
    checkpoints = Checkpoints(run.path / "checkpoints")
    outcome = train(
        work.model,
        work.objective,
        work.rows,
        work.validation,
        parameters=work.parameters,
        optimizer=work.config.optimizer,
        schedule=work.config.schedule,
        settings=work.settings,
        checkpoints=checkpoints,
        events=run.events,
        resume=resume,
    )
    run.update(
        numbers={
            **run.record.numbers,
            "steps": outcome.progress.step,
            "best_step": outcome.progress.best_step or outcome.progress.step,
            "tokens": outcome.progress.tokens,
            "tokens_per_second": round(outcome.tokens_per_second, 1),
            "training_seconds": round(run.record.numbers.get("training_seconds", 0.0) + outcome.seconds, 1),
            "stopped_early": outcome.stopped_early,
        }
    )
    work.keep_model(run)
    work.judge(run)
    for checkpoint in checkpoints.steps():
        shutil.rmtree(checkpoint, ignore_errors=True)


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


class _Work:
    """The state of one tuning between its stages: read, encode, (train), keep, judge."""

    def __init__(self, asked: Resolved[Tune], events: Events, model: LoadedModel | None = None):
        self.asked, self.events, self.given = asked, events, model
        self.model: LoadedModel
        self.dataset: Dataset
        self.objective: Objective
        self.settings: Settings

    @property
    def config(self) -> Tune:
        return self.asked.config

    def read(self) -> None:
        """Read the data and load the model for the objective."""
        import torch

        from luthier.models.load import load_model
        from luthier.training.allocator import keep_freed_memory

        config, events = self.config, self.events
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        keep_freed_memory()
        events.stage("reading the data")
        self.dataset = load_data(config.data, events)
        if config.objective == "auto":
            from luthier.models.load import read_kind

            name, why = defaults.choose_objective(self.dataset.train[0], read_kind(config.model))
            self._advise("objective", OBJECTIVES.parse(name), why, shown=name)
        objective: Objective = self.config.objective
        objective.check_examples(self.dataset.train)
        self.objective = objective.prepare(self.dataset.train, events)
        events.stage(f"loading the model {config.model}")
        wanted: dict[str, Any] = {
            **objective.load_options(self.dataset.train),
            "template": config.template,
            "max_length": config.max_length,
            "truncate": config.truncate,
        }
        if objective.task is not None:
            wanted["pooling"] = config.pooling
        if self.given is not None:
            from luthier.models.wrap import fit_model

            self.model = fit_model(self.given, **wanted)
        else:
            self.model = load_model(
                config.model,
                from_scratch=config.from_scratch,
                learn=config.learn,
                device=config.device,
                events=events,
                **wanted,
            )
        self.objective.check_model(self.model.spec)
        self.objective.adapt(self.model, self.dataset.train)
        config.adapter.apply(self.model)
        self.parameters = list(config.adapter.trainable(self.model))
        self._choose_precision()

    def _choose_precision(self) -> None:
        from luthier.models.fuse import fuse
        from luthier.models.packed import packs
        from luthier.models.precision import cast_weights, choose_precision

        if self.config.precision == "auto":
            count = sum(parameter.numel() for parameter in self.model.module.parameters())
            frozen = sum(parameter.numel() for _, parameter in self.parameters) < count / 2
            chosen, why = choose_precision(self.model.device, frozen_base=frozen, parameters=count)
            self._advise("precision", chosen, why)
        cast_weights(self.model, self.config.precision)  # type: ignore[arg-type]
        if packs(self.model, self.events):
            fuse(self.model, self.events)

    def encode(self) -> None:
        """Turn the rows into tokens, and decide everything that was left to us."""
        from luthier.training.loop import Settings

        events, dataset = self.events, self.dataset
        events.stage(f"encoding {len(dataset.train)} rows")
        self.rows = self.objective.encode(dataset.train, self.model, events)
        self.validation = self.objective.encode(dataset.validation, self.model, events) if dataset.validation else []
        config, kind = self.config, self.objective.kind
        if config.batch_size == "auto":
            size, why = defaults.choose_batch_size(len(self.rows), kind)
            self._advise("batch_size", size, why)
        if config.steps is None and config.epochs == "auto":
            epochs, why = defaults.choose_epochs(len(self.rows), kind)
            self._advise("epochs", epochs, why)
        if config.learning_rate == "auto":
            count = sum(parameter.numel() for parameter in self.model.module.parameters())
            rate, why = defaults.choose_learning_rate(count, config.adapter.kind, kind, config.from_scratch)
            self._advise("learning_rate", rate, why)
        config = self.config
        an_epoch = math.ceil(len(self.rows) / int(config.batch_size))
        steps = config.steps or max(1, round(float(config.epochs) * an_epoch))
        if config.validate_every in ("auto", "epoch"):
            every, why = (
                defaults.choose_validation(steps, an_epoch)
                if config.validate_every == "auto"
                else (an_epoch, "once an epoch")
            )
            self._advise("validate_every", every, why)
        if config.checkpoint_every == "auto":
            self._advise("checkpoint_every", max(1, math.ceil(steps / 10)), "ten times in all", quiet=True)
        config = self.config
        self.settings = Settings(
            steps=steps,
            batch_size=int(config.batch_size),
            accumulate=config.accumulate,
            micro_tokens=config.micro_tokens,
            learning_rate=float(config.learning_rate),
            clip=config.clip,
            validate_every=int(config.validate_every),
            patience=config.patience,
            checkpoint_every=int(config.checkpoint_every),
            by_length=config.by_length,
            seed=config.seed,
        )

    def numbers(self) -> dict[str, Any]:
        """Sizes of the work: rows, tokens, parameters, steps."""
        parameters = list(self.model.module.parameters())
        return {
            "steps": self.settings.steps,
            "train_rows": len(self.rows),
            "validation_rows": len(self.validation),
            "test_rows": len(self.dataset.test),
            "tokens_an_epoch": sum(len(row.ids) + len(row.target) for row in self.rows),
            "longest_row": max(len(row.ids) + len(row.target) for row in self.rows),
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable_parameters": sum(parameter.numel() for _, parameter in self.parameters),
        }

    def estimate_memory(self) -> dict[str, int]:
        """Predicted peak memory in bytes, by part."""
        from luthier.models.memory import estimate_memory

        longest = sorted((len(row.ids) + len(row.target) for row in self.rows), reverse=True)
        rows = math.ceil(self.settings.batch_size / self.settings.accumulate)
        trainable = sum(parameter.numel() for _, parameter in self.parameters)
        # A step with more than micro_tokens is split, but for a row that is longer than that alone.
        at_once = min(rows * longest[0], max(self.settings.micro_tokens, longest[0]))
        return estimate_memory(self.model, trainable=trainable, batch_tokens=at_once)

    def keep_inputs(self, run: Run) -> None:
        """Write what was read: profile, fingerprint, a few rows as the model sees them."""
        data = {
            "fingerprint": self.dataset.fingerprint,
            "train": len(self.dataset.train),
            "validation": len(self.dataset.validation),
            "test": len(self.dataset.test),
            "dropped": self.dataset.dropped,
            "shape": self.dataset.shape,
        }
        (run.artefacts / "profile.json").write_text(
            json.dumps(self.dataset.profile, ensure_ascii=False), encoding="utf-8"
        )
        with open(run.artefacts / "samples.jsonl", "w", encoding="utf-8") as file:
            for row in self.rows[:5]:
                shown = {"id": row.id, "tokens": self.model.renderer.describe(row), "gold": row.gold}
                file.write(json.dumps(shown, ensure_ascii=False) + "\n")
        lineage = {
            "model": self.config.model,
            "data": str(self.config.data.model_dump(mode="json").get("train")),
            "adapter": self.config.adapter.kind,
        }
        artefacts = {"profile": "artefacts/profile.json", "samples": "artefacts/samples.jsonl"}
        run.update(data=data, lineage=lineage, artefacts=artefacts, numbers={**run.record.numbers, **self.numbers()})

    def keep_model(self, run: Run) -> None:
        """Save the tuned model, whole or not at all."""
        from luthier.models.fuse import unfuse
        from luthier.models.save import save_model

        run.events.stage("saving the model")
        unfuse(self.model)
        self.model.spec = self.model.spec.model_copy(update={"learned": self.objective.kind})
        side, final = run.artefacts / ".model.part", run.artefacts / "model"
        shutil.rmtree(side, ignore_errors=True)
        try:
            save_model(self.model, side)
        except OSError as err:
            shutil.rmtree(side, ignore_errors=True)
            raise RunError(
                f"{final}: the model could not be written ({err.strerror or err}); the checkpoints are whole: "
                f"make room, then `luthier tune --resume run:{run.id}`"
            ) from None
        self._check_saved(run, side)
        shutil.rmtree(final, ignore_errors=True)
        side.rename(final)
        self.model.spec = self.model.spec.model_copy(update={"source": f"run:{run.id}"})
        run.update(artefacts={**run.record.artefacts, "model": "artefacts/model"})

    def _check_saved(self, run: Run, path: Path) -> None:
        """Load what was saved, and compare: a file that holds another model than the one tuned is no result."""
        from luthier.models.load import load_model
        from luthier.training.tripwires import same_model

        try:
            again = load_model(str(path), device=str(self.model.device))
        except LuthierError as err:
            run.events.warn(f"the saved model could not be loaded again to compare it: {err}")
            return
        if not same_model(self.model, again, self.rows[0].ids):
            raise TrainingError(
                f"{path}: the saved model computes something else than the tuned one, so it was not put into place; the "
                f"checkpoints are whole; please report it with the run's config.yaml"
            )

    def judge(self, run: Run) -> None:
        """Evaluate on the test part (else the validation part), beside the baselines; keep every prediction."""
        from luthier.evals.baselines import baselines_for
        from luthier.evals.judge import judge
        from luthier.evals.predict import predict_examples

        part, examples = ("test", self.dataset.test) if self.dataset.test else ("validation", self.dataset.validation)
        if not examples:
            run.events.warn(
                "nothing was held out, so the tuned model was not judged; give data.test or data.split.test"
            )
            return
        run.events.stage(f"judging on {len(examples)} held-out rows")
        spec = self.model.spec
        predictions = predict_examples(self.model, examples, events=run.events)
        metrics, details = judge(predictions, spec.task, spec.labels)
        details["evaluated_on"] = part
        write_rows(run.artefacts / "predictions.jsonl", predictions)
        (run.artefacts / "details.json").write_text(json.dumps(details, ensure_ascii=False), encoding="utf-8")
        found = {}
        for baseline in baselines_for(spec.task) if self.config.baselines else ():
            run.events.stage(f"judging the baseline {baseline.kind}")
            guesses = baseline.predict(self.dataset.train, examples)
            write_rows(run.artefacts / f"predictions-{baseline.kind}.jsonl", guesses)
            found[baseline.kind] = judge(guesses, spec.task, spec.labels)[0]
        artefacts = {"predictions": "artefacts/predictions.jsonl", "details": "artefacts/details.json"}
        run.update(metrics=metrics, baselines=found, artefacts={**run.record.artefacts, **artefacts})

    def _advise(self, name: str, value: Any, why: str, *, shown: Any = None, quiet: bool = False) -> None:
        self.asked = self.asked.advise(**{name: value})
        if not quiet:
            self.events.choose(name, value if shown is None else shown, why)


def _as_resolved(
    asked: Resolved[Tune] | Tune | None, resume: str | None, settings: Mapping[str, Any]
) -> Resolved[Tune]:
    if resume:
        if asked is not None or settings:
            raise ConfigError("--resume goes on with the run exactly as it was asked for; give no other settings")
        return resolve(Tune, file=find_run(resume) / "config.yaml")
    if isinstance(asked, Tune):
        return Resolved(asked, dict.fromkeys(asked.model_fields_set, "override"))
    return asked if asked is not None else resolve(Tune, values=settings)


def _write_report(path: Path) -> None:
    from luthier.reporting.page import write_report

    write_report(path)
