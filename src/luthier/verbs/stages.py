"""The stages of one tuning: read, encode, (train), keep, judge."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.choice import defaults
from luthier.core.config import Resolved
from luthier.core.errors import LuthierError, RunError, TrainingError
from luthier.core.events import Events
from luthier.core.run import Run, write_rows
from luthier.data.load import Dataset, load_data
from luthier.text.answers import split_answers
from luthier.training.objectives import OBJECTIVES

if TYPE_CHECKING:
    from luthier.evals.preferences import Logs
    from luthier.models.spec import LoadedModel
    from luthier.training.learner import Settings
    from luthier.training.objectives.part import Objective
    from luthier.verbs.tune import Tune


class Work:
    """The state of one tuning between its stages."""

    def __init__(self, asked: Resolved[Tune], events: Events, model: LoadedModel | None = None):
        self.asked, self.events, self.given = asked, events, model
        self.model: LoadedModel
        self.dataset: Dataset
        self.objective: Objective
        self.settings: Settings
        self.before: Logs | None = None

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
        from luthier.training.learner import Settings

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

    def refer(self, run: Run) -> None:
        """Let the model say of the rows, before it learns, what the objective and the judge will hold against it."""
        from luthier.evals.preferences import read_answers, reads_answers

        keep = run.path / "reference"
        self.rows = self.objective.refer(self.rows, self.model, run.events, keep)
        self.validation = self.objective.refer(self.validation, self.model, run.events, keep)
        held = self.dataset.test or self.dataset.validation
        if reads_answers(held) and self.objective.task is None and (self.objective.refers or self.config.baselines):
            run.events.stage(f"reading {len(held)} held-out rows with the model as it starts")
            self.before = read_answers(self.model, held, run.events, "reference")

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
            found = found if self.config.baselines else {}
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
