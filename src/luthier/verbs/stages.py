"""The stages of one tuning: read, encode, (train), keep, judge."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.choice import defaults
from luthier.core.config import Resolved
from luthier.core.errors import ConfigError, DataError, LuthierError, RunError, TrainingError
from luthier.core.events import Events
from luthier.core.run import Run, write_rows
from luthier.core.types import Encoded
from luthier.data.cache import lengths_of
from luthier.data.feed import Feed, HeldRows, StreamedRows
from luthier.data.load import Dataset, load_data
from luthier.data.mix import weights_of
from luthier.data.plans import Plan
from luthier.text.answers import split_answers
from luthier.training.objectives import OBJECTIVES
from luthier.training.schedules import SCHEDULES

if TYPE_CHECKING:
    from luthier.evals.preferences import Logs
    from luthier.models.spec import LoadedModel
    from luthier.training.checkpoint import Checkpoints, Progress
    from luthier.training.learner import Settings
    from luthier.training.objectives.part import Objective
    from luthier.training.sharding import Sharded
    from luthier.training.world import World
    from luthier.verbs.tune import Tune


# Rows of a stream, as far as choices by their number go.
MANY = 1_000_000


class Work:
    """The state of one tuning between its stages."""

    def __init__(
        self, asked: Resolved[Tune], events: Events, model: LoadedModel | None = None, world: World | None = None
    ):
        from luthier.training.world import ALONE

        self.asked, self.events, self.given = asked, events, model
        self.world = world or ALONE
        self.sharded: Sharded | None = None
        self.model: LoadedModel
        self.dataset: Dataset
        self.objective: Objective
        self.settings: Settings
        self.before: Logs | None = None
        self.feed: Feed

    @property
    def config(self) -> Tune:
        return self.asked.config

    def check(self) -> None:
        """Raises ConfigError for settings that do not go together, before anything is read."""
        _check_stream(self.config)
        _check_order(self.config)

    def read(self) -> None:
        """Read the data and load the model for the objective."""
        import torch

        from luthier.models.load import load_model
        from luthier.training.allocator import keep_freed_memory

        config, events = self.config, self.events
        threads = self.world.threads(config.threads)
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(config.seed)
        keep_freed_memory()
        events.stage("reading the data")
        self.dataset = load_data(config.data, events)
        if config.objective == "auto":
            from luthier.models.load import read_kind

            name, why = defaults.choose_objective(self.dataset.train[0], read_kind(config.model))
            self._advise("objective", OBJECTIVES.parse(name), why, shown=name)
        objective: Objective = self.config.objective
        _check_sources(self.dataset, objective)
        objective.check_examples(self.dataset.train)
        if self.dataset.stream is not None and objective.refers:
            raise ConfigError(
                f"objective {objective.kind!r} measures every row against the model as it was before the first step, so it "
                "needs all rows at hand; set data.stream: false"
            )
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
        form = self._choose_form()
        if self.given is not None:
            from luthier.models.wrap import fit_model

            self.model = fit_model(self.given, **wanted)
            if form in ("int8", "nf4"):
                from luthier.models.quantised.network import quantise_loaded

                quantise_loaded(self.model, form, events)  # type: ignore[arg-type]
        else:
            self.model = load_model(
                config.model,
                from_scratch=config.from_scratch,
                learn=config.learn,
                device=self.world.device(config.device),
                # In full: what an earlier tuning rounded to bfloat16 would stay rounded in one that computes in fp32.
                dtype="float32",
                quantize=form,  # type: ignore[arg-type]
                events=events,
                **wanted,
            )
        self.objective.check_model(self.model.spec)
        self.objective.adapt(self.model, self.dataset.train)
        config.adapter.apply(self.model)
        self.parameters = list(config.adapter.trainable(self.model))
        self._choose_precision()
        self.objective.ready(self.model, events)
        if self.shards:
            from luthier.training.sharding import check_sharding

            check_sharding(config.optimizer, self.objective)
            if config.ema:
                raise ConfigError(
                    "ema: no average is kept of weights that are shared out; set ema: 0 or sharding: none"
                )

    @property
    def shards(self) -> bool:
        return self.config.sharding == "full" and self.world.size > 1

    def _choose_form(self) -> str:
        """The form to hold the base in; a whole one where its weights learn or the adapter is merged."""
        config, adapter = self.config, self.config.adapter
        if config.quantize in ("int8", "nf4"):
            if not adapter.quantises:
                raise ConfigError(
                    f"quantize: the adapter {adapter.kind!r} needs the base's own weights, which {config.quantize} cannot "
                    "hold; choose adapter lora, or leave quantize out"
                )
            if config.from_scratch:
                raise ConfigError("quantize: random weights learn nothing under an adapter; leave out from_scratch")
        return config.quantize if adapter.quantises or config.quantize != "auto" else "none"

    def _choose_precision(self) -> None:
        from luthier.models.facts import count_parameters
        from luthier.models.fuse import fuse
        from luthier.models.packed import packs
        from luthier.models.precision import cast_weights, choose_precision

        if self.config.precision == "auto":
            count = count_parameters(self.model.module)
            frozen = sum(parameter.numel() for _, parameter in self.parameters) < count / 2
            chosen, why = choose_precision(self.model.device, frozen_base=frozen, parameters=count)
            self._advise("precision", chosen, why)
        cast_weights(self.model, self.config.precision)  # type: ignore[arg-type]
        if packs(self.model, self.events):
            fuse(self.model, self.events)

    def encode(self) -> None:
        """Turn the rows into tokens, and decide everything that was left to us."""
        from luthier.models.facts import count_parameters
        from luthier.models.packed import shares
        from luthier.training.learner import Settings

        events, dataset = self.events, self.dataset
        events.stage(f"encoding {len(dataset.train)} rows")
        self.rows, self.validation = self._encode_part("train"), self._encode_part("validation")
        if self.objective.refers:
            shares(self.model, events)
        config, kind = self.config, self.objective.kind
        if config.batch_size == "auto":
            size, why = defaults.choose_batch_size(MANY if dataset.stream else len(self.rows), kind)
            self._advise("batch_size", size, why)
        if config.steps is None and config.epochs == "auto":
            epochs, why = defaults.choose_epochs(len(self.rows), kind)
            self._advise("epochs", epochs, why)
        if config.learning_rate == "auto":
            count = count_parameters(self.model.module)
            rate, why = defaults.choose_learning_rate(count, config.adapter.kind, kind, config.from_scratch)
            if config.optimizer.rate != 1:
                rate = float(f"{rate * config.optimizer.rate:.1e}")
                why += f", times {config.optimizer.rate:g} for {config.optimizer.kind}"
            self._advise("learning_rate", rate, why)
        if config.optimizer.schedule and self.asked.origin("schedule") == "default":
            why = f"{config.optimizer.kind} averages the weights in place of a falling rate"
            self._advise("schedule", SCHEDULES.parse(config.optimizer.schedule), why, shown=config.optimizer.schedule)
        config = self.config
        an_epoch = math.ceil(len(self.rows) / int(config.batch_size))
        steps = config.steps or max(1, round(float(config.epochs) * an_epoch))
        an_epoch = steps if dataset.stream else an_epoch
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
            seed=config.seed,
            ema=config.ema,
            noise=config.noise,
        )
        self.feed = self._make_feed()

    def _encode_part(self, part: str) -> Sequence[Encoded]:
        """The rows of the training or the validation part, source by source, each with its source's name."""
        from luthier.training.encoded import encode_once

        found = {
            name: encode_once(f"{part}/{name}", examples, self.objective, self.model, self.world, self.events)
            for name, examples in self.dataset.split_by_source(part).items()
            if examples
        }
        if set(found) <= {""}:
            return found.get("", [])
        return [replace(row, source=name) for name, rows in found.items() for row in rows]

    def _make_feed(self) -> Feed:
        config, settings, dataset = self.config, self.settings, self.dataset
        if dataset.stream is not None:
            return StreamedRows(
                dataset.stream,
                lambda examples, events: self.objective.encode(examples, self.model, events),
                batch_size=settings.batch_size,
                steps=settings.steps,
                seed=config.seed,
                window=config.data.shuffle_buffer,
                shuffled=config.order == "shuffled",
                by_length=config.by_length,
            )
        plan = Plan(
            lengths_of(self.rows),
            settings.batch_size,
            settings.steps,
            config.seed,
            config.order,
            config.by_length,
            [row.source for row in self.rows] if dataset.weights else (),
            dataset.weights,
        )
        return HeldRows(self.rows, plan)

    def drawn(self, progress: Progress) -> dict[str, Any]:
        """What was learned from: rows of each of several sources, and the passes over a stream."""
        found: dict[str, Any] = {"drawn": dict(progress.drawn)} if progress.drawn else {}
        stream = self.dataset.stream
        if stream is not None and progress.place is not None:
            passes = [mark[0] for mark in progress.place["marks"]]
            found["passes"] = dict(zip(self.dataset.weights, passes)) if stream.mixed else passes[0]
        return found

    def scales(self) -> dict[str, float]:
        """At what multiple of the learning rate each weight learns, where it is not 1."""
        from luthier.training.rates import combine, layer_scales

        names = [name for name, _ in self.parameters]
        return combine(names, self.config.adapter.scales(self.model), layer_scales(names, self.config.layer_decay))

    def begin(self) -> None:
        """Form the group of processes, now that nothing slow is left to do alone, and share out the weights if asked."""
        world = self.world
        if world.size == 1:
            return
        import torch

        self.events.stage(f"joining {world.size} processes")
        world.begin(self.model.device)
        with torch.no_grad():
            # Heads and adapters start at random, from the same seed on machines that need not be alike.
            start = world.spread(dict(self.parameters) if world.leads else None)
            for name, parameter in self.parameters:
                parameter.copy_(start[name])
        self.events.choose("processes", world.size, "each learns from its share of every step; gradients are added up")
        if self.shards:
            from luthier.training.sharding import Sharded

            self.sharded = Sharded(self.model, world)
            self.parameters = list(self.config.adapter.trainable(self.model))

    def gather(self) -> None:
        """Leave the group: what is left is done by the first process, with the whole model."""
        if self.sharded is not None:
            self.sharded.gather()
        self.world.end()

    def checkpoints(self, path: Path) -> Checkpoints:
        """The checkpoints of the run at `path`."""
        from luthier.training.checkpoint import Checkpoints

        if self.config.sharding == "none":
            return Checkpoints(path / "checkpoints", world=self.world)
        from luthier.training.sharding import ShardedCheckpoints

        return ShardedCheckpoints(path / "checkpoints", world=self.world, parameters=self.parameters)

    def numbers(self) -> dict[str, Any]:
        """Sizes of the work: rows, tokens, parameters, steps."""
        from luthier.models.facts import count_parameters

        lengths = lengths_of(self.rows)
        return {
            "steps": self.settings.steps,
            "train_rows": self.feed.rows_an_epoch,
            "validation_rows": len(self.validation),
            "test_rows": len(self.dataset.test),
            "tokens_an_epoch": None if self.dataset.stream else sum(lengths),
            "longest_row": max(lengths),
            "parameters": count_parameters(self.model.module),
            "trainable_parameters": sum(parameter.numel() for _, parameter in self.parameters),
        }

    def estimate_memory(self) -> dict[str, int]:
        """Predicted peak memory in bytes, by part."""
        from luthier.models.memory import estimate_memory

        longest = sorted(lengths_of(self.rows), reverse=True)
        rows = math.ceil(self.settings.batch_size / self.settings.accumulate)
        trainable = sum(parameter.numel() for _, parameter in self.parameters)
        # A step with more than micro_tokens is split, but for a row that is longer than that alone.
        at_once = min(rows * longest[0], max(self.settings.micro_tokens, longest[0]))
        slots = self.config.optimizer.slots + bool(self.config.ema)
        return estimate_memory(self.model, trainable=trainable, batch_tokens=at_once, optimizer_slots=slots)

    def keep_inputs(self, run: Run) -> None:
        """Write what was read: profile, fingerprint, a few rows as the model sees them."""
        data = {
            "fingerprint": self.dataset.fingerprint,
            "train": self.feed.rows_an_epoch and len(self.dataset.train),
            "validation": len(self.dataset.validation),
            "test": len(self.dataset.test),
            "dropped": self.dataset.dropped,
            "shape": self.dataset.shape,
        }
        (run.artefacts / "profile.json").write_text(
            json.dumps(self.dataset.profile, ensure_ascii=False), encoding="utf-8"
        )
        with open(run.artefacts / "samples.jsonl", "w", encoding="utf-8") as file:
            for row in (part for whole in self.rows[:5] for part in split_answers(whole)):
                shown = {"id": row.id, "tokens": self.model.renderer.describe(row), "gold": row.gold}
                file.write(json.dumps(shown, ensure_ascii=False) + "\n")
        lineage = {
            "model": self.config.model,
            "data": str(self.config.data.model_dump(mode="json").get("train")),
            "adapter": self.config.adapter.kind,
        }
        artefacts = {"profile": "artefacts/profile.json", "samples": "artefacts/samples.jsonl"}
        run.update(data=data, lineage=lineage, artefacts=artefacts, numbers={**run.record.numbers, **self.numbers()})

    def refer(self, path: Path) -> None:
        """Let the model say of the rows, before it learns, what the objective and the judge will hold against it.

        The first process keeps what it said in the run at `path`, where the others find it.
        """
        from luthier.evals.preferences import read_answers, reads_answers

        keep = path / "reference"
        if not self.world.leads:
            self.world.hear("referred")
        self.rows = self.objective.refer(self.rows, self.model, self.events, keep)
        self.validation = self.objective.refer(self.validation, self.model, self.events, keep)
        self.feed = self._make_feed()
        self.world.tell("referred", "")
        if not self.world.leads:
            return
        held = self.dataset.test or self.dataset.validation
        if reads_answers(held) and self.objective.task is None:
            self.events.stage(f"reading {len(held)} held-out rows with the model as it starts")
            self.before = read_answers(self.model, held, self.events, "reference")

    def keep_model(self, run: Run) -> None:
        """Save the tuned model, whole or not at all."""
        from luthier.models.fuse import unfuse
        from luthier.models.save import save_model

        run.events.stage("saving the model")
        unfuse(self.model)
        self.model.spec = self.model.spec.model_copy(update={"learned": self.objective.learned()})
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
        from luthier.evals.preferences import judge_answers, read_answers, reads_answers

        part, examples = ("test", self.dataset.test) if self.dataset.test else ("validation", self.dataset.validation)
        if not examples:
            run.events.warn(
                "nothing was held out, so the tuned model was not judged; give data.test or data.split.test"
            )
            return
        run.events.stage(f"judging on {len(examples)} held-out rows")
        spec, fitting = self.model.spec, baselines_for(self.model.spec.task) if self.config.baselines else ()
        found: dict[str, Any] = {}
        if reads_answers(examples):
            logs, fitting = read_answers(self.model, examples, run.events), ()
            predictions, metrics, details, found = judge_answers(
                examples, logs, self.before, refers=self.objective.refers
            )
        else:
            predictions = predict_examples(self.model, examples, events=run.events)
            metrics, details = judge(predictions, spec.task, spec.labels)
        details["evaluated_on"] = part
        write_rows(run.artefacts / "predictions.jsonl", predictions)
        (run.artefacts / "details.json").write_text(json.dumps(details, ensure_ascii=False), encoding="utf-8")
        for baseline in fitting:
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


def _check_stream(config: Tune) -> None:
    if not config.data.stream:
        return
    if config.steps is None:
        raise ConfigError("data.stream: nobody knows how long a pass over a stream is; give `steps` instead of epochs")
    if config.validate_every == "epoch":
        raise ConfigError("validate_every: a stream has no epochs; give a number of steps")
    if config.order not in ("shuffled", "given"):
        raise ConfigError(
            f"order: {config.order!r} needs all rows at hand, and a stream has them not; use 'shuffled' or 'given'"
        )


def _check_order(config: Tune) -> None:
    if config.order == "competence" and weights_of(config.data.train):
        raise ConfigError(
            "order: 'competence' draws from all rows alike, so weights have no meaning for it; take either out"
        )


def _check_sources(dataset: Dataset, objective: Objective) -> None:
    """Sources may differ in shape, if the objective learns from each."""
    for name, examples in dataset.by_source.get("train", {}).items():
        if not isinstance(examples[0], objective.wants):
            others = dataset.by_source["train"].items()
            fits = [
                f"{other} with {type(rows[0]).__name__} rows"
                for other, rows in others
                if isinstance(rows[0], objective.wants)
            ]
            raise DataError(
                f"{name}: objective {objective.kind!r} does not learn from its {type(examples[0]).__name__} rows"
                + (f", only from {', '.join(fits)}" if fits else "")
                + "; take it out, or map its columns with `columns:` of the source"
            )
