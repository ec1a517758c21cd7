"""Judge a model on held-out rows: every prediction kept, every number with its interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from luthier.core.config import Config, Resolved, resolve
from luthier.core.errors import ConfigError, DataError, LuthierError
from luthier.core.events import Events, Sink
from luthier.core.record import Record
from luthier.core.run import Run, discard, write_rows
from luthier.core.types import Example, Labelled, Prediction, Task, Text
from luthier.data.load import Data, fingerprint_examples, load_examples
from luthier.data.preferences import holds_answers
from luthier.data.profile import profile_examples
from luthier.engine.backend import Backend, refuse_here
from luthier.engine.labelling import Labelling, Labels
from luthier.engine.sampling import Execution, Sampling

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel, ModelSpec


class Evaluate(Config):
    """What to judge, and on which rows."""

    model: str
    """A shipped model, a hub id, a directory, or run:<id>."""
    data: Data
    """The rows to judge on: a file or a table of settings, of which `test` (else `train`) is read."""
    train: Any = None
    """Training rows for the plain baselines; without them none is judged."""
    sampling: Sampling = Sampling()
    """How answers are written, for models that write."""
    labels: Labels = ()
    """Labels that a language model chooses among, for rows that carry one; by default those of the rows."""
    labelling: Labelling = Labelling()
    """How it is asked for a label, and how labels are compared."""
    shots: Path | None = None
    """A file of examples to put before each text that a language model gives a label: text and label."""
    reference: str | None = None
    """For answers that were liked or not: the model before tuning, whose likelihood is taken off, as in DPO and KTO."""
    likelihood: bool = False
    """Score the gold answers by likelihood (perplexity) instead of writing answers."""
    max_length: int | None = Field(None, gt=1)
    """Longest row in tokens; by default the model's context."""
    truncate: bool = False
    """Cut rows that are too long (and count them) instead of refusing them."""
    batch_size: int = Field(32, gt=0)
    """Answers written at a time."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda ..."""
    execution: Execution = "auto"
    """How a language model is read while it writes or scores labels, on a CPU: by itself (model), or by the native decoder
    with its weights in bfloat16, int8 or int4. auto: int8 where it changes next to nothing (measured at loading, and said),
    else bfloat16, else model; small models always by themselves."""
    draft: str | None = None
    """A smaller model with the same tokenizer, which guesses what the language model writes; that changes the time alone."""
    backend: Backend | None = None
    """A server that holds the weights and writes in place of this machine: its address, or a table of settings. `model` then
    gives tokenizer and template alone."""
    name: str | None = None
    """The run's name; by default the verb and the time."""

    @field_validator("sampling")
    @classmethod
    def _one_text(cls, sampling: Sampling) -> Sampling:
        if sampling.beyond_text is not None:
            raise ValueError(f"{sampling.beyond_text}: one answer to each row is judged, as a text; leave it out")
        return sampling

    @model_validator(mode="after")
    def _here_or_there(self) -> Evaluate:
        if self.backend is not None:
            refuse_here(self.device, self.execution, self.draft)
            for name in ("reference", "likelihood"):
                if getattr(self, name):
                    raise ValueError(f"{name}: likelihoods are computed here, by the weights; leave `backend` out")
        return self


def evaluate(
    asked: Resolved[Evaluate] | Evaluate | None = None, *, sinks: Sequence[Sink] = (), **settings: Any
) -> Record:
    """Judge a model and return the run's record; `luthier.evaluate(model=..., data=...)` from Python.

    Raises LuthierError: a model or file that cannot be had, rows that do not fit the model, a label it never learned.
    """
    if isinstance(asked, Evaluate):
        asked = Resolved(asked, dict.fromkeys(asked.model_fields_set, "override"))
    asked = asked or resolve(Evaluate, values=settings)
    run = Run.create("evaluate", asked, name=asked.config.name, sinks=sinks)
    with run.working():
        try:
            _judge(run, asked.config)
        except (LuthierError, KeyboardInterrupt):
            discard(run)
            raise
    from luthier.reporting.page import write_report

    write_report(run.path)
    return run.record


def _judge(run: Run, config: Evaluate) -> None:
    from luthier.engine.loading import load_stored, settle_model, take_draft
    from luthier.engine.native import refuse
    from luthier.engine.remote import load_served
    from luthier.evals.baselines import baselines_for
    from luthier.evals.judge import judge
    from luthier.evals.preferences import judge_answers, read_answers

    run.events.stage("reading the data")
    source = config.data.train if config.data.test is None else config.data.test
    examples = load_examples(source, config.data, run.events)
    train = [] if config.train is None else load_examples(config.train, config.data, run.events)
    run.events.stage(f"loading the model {config.model}")
    lengths: dict[str, Any] = {"max_length": config.max_length, "truncate": config.truncate}
    # By likelihood a model is judged as it is.
    scored = config.likelihood or holds_answers(examples) or isinstance(examples[0], Text)
    if config.backend is None:
        execution = "model" if scored else config.execution
        model = load_stored(config.model, execution, run.events, device=config.device, **lengths)
    else:
        if holds_answers(examples) or isinstance(examples[0], Text):
            raise ConfigError(
                f"backend: {examples[0].id} is a row that is scored by likelihood, which is computed here, by the weights; "
                "leave `backend` out"
            )
        model = load_served(config.model, config.backend, **lengths, events=run.events)
    spec = model.spec
    _check_labels(examples, spec.labels, config.model)
    run.events.stage(f"judging on {len(examples)} rows")
    found: dict[str, Any] = {}
    chosen = _choose_labels(config, spec, examples, train, run.events)
    if chosen and config.backend is not None:
        raise ConfigError(
            "backend: classes are chosen by the likelihood of their labels, which is computed here, by the weights; "
            "leave `backend` out"
        )
    task: Task = "classify" if chosen else spec.task
    labels = chosen or spec.labels
    if holds_answers(examples):
        logs, before = read_answers(model, examples, run.events), _read_reference(config, spec, examples, run.events)
        predictions, metrics, details, found = judge_answers(examples, logs, before, refers=before is not None)
    else:
        if spec.task == "causal" and not scored and config.backend is None:
            if chosen:
                refuse("auto", config.draft)
            settle_model(model, config.execution, run.events, max_length=config.max_length)
            if config.draft is not None:
                take_draft(model, config.draft, config.execution, run.events)
        elif config.backend is None:
            refuse(config.execution, config.draft)
        predictions = _predict(config, model, examples, chosen, run.events)
        metrics, details = judge(predictions, task, labels)
    details["evaluated_on"] = "test"
    write_rows(run.artefacts / "predictions.jsonl", predictions)
    (run.artefacts / "details.json").write_text(json.dumps(details, ensure_ascii=False), encoding="utf-8")
    profile = profile_examples(examples)
    (run.artefacts / "profile.json").write_text(json.dumps(profile, ensure_ascii=False), encoding="utf-8")
    if config.train is not None:
        baselines = () if holds_answers(examples) else baselines_for(task)
        if not baselines:
            raise ConfigError(f"train: there is no plain baseline for a model made to {task}; leave `train` out")
        for baseline in baselines:
            run.events.stage(f"judging the baseline {baseline.kind}")
            guesses = baseline.predict(train, examples)
            write_rows(run.artefacts / f"predictions-{baseline.kind}.jsonl", guesses)
            found[baseline.kind] = judge(guesses, task, labels)[0]
    artefacts = {name: f"artefacts/{name}" for name in ("predictions.jsonl", "details.json", "profile.json")}
    run.update(
        metrics=metrics,
        baselines=found,
        data={"fingerprint": fingerprint_examples(examples), "test": len(examples)},
        lineage={
            "model": config.model,
            "data": str(config.data.model_dump(mode="json")["train"]),
            **({"server": f"{model.server.name} at {config.backend.url}"} if config.backend is not None else {}),
        },
        artefacts={name.partition(".")[0]: path for name, path in artefacts.items()},
    )


def _choose_labels(
    config: Evaluate, spec: ModelSpec, examples: Sequence[Example], train: Sequence[Example], events: Events
) -> tuple[str, ...]:
    """The labels that a language model chooses among; none where it is judged otherwise, or is none."""
    from luthier.evals.labels import choose_labels

    if spec.task == "causal" and isinstance(examples[0], Labelled):
        if config.likelihood:
            raise ConfigError(
                "likelihood: these rows carry labels, each of which is scored anyway; leave likelihood out"
            )
        if config.sampling != Sampling():
            raise ConfigError("sampling has no effect where labels are scored and nothing is written; leave it out")
        return choose_labels([*examples, *train], config.labels, events)
    idle = next((name for name in ("labels", "labelling", "shots") if name in config.model_fields_set), None)
    if idle is not None:
        raise ConfigError(
            f"{idle}: goes with a language model and rows that carry a label; {config.model} is made to {spec.task}, and "
            f"these rows are {type(examples[0]).__name__}"
        )
    return ()


def _predict(
    config: Evaluate, model: LoadedModel, examples: Sequence[Example], labels: Sequence[str], events: Events
) -> list[Prediction]:
    from luthier.evals.labels import predict_labels
    from luthier.evals.predict import predict_examples
    from luthier.verbs.shots import load_shots

    if labels:
        shots = load_shots(model, config.model, config.shots, events)
        return predict_labels(model, examples, labels, config.labelling, shots=shots, events=events)
    return predict_examples(
        model,
        examples,
        sampling=config.sampling,
        batch_size=config.batch_size,
        likelihood=config.likelihood,
        events=events,
    )


def _read_reference(config: Evaluate, spec: ModelSpec, examples: Sequence[Example], events: Events) -> Any:
    """What the reference says of the answers; None where none is named."""
    from luthier.evals.preferences import read_answers
    from luthier.models.load import load_model

    if config.reference is None:
        return None
    if spec.task != "causal":
        raise ConfigError(f"reference: {config.model} is made to {spec.task}, and needs none; leave `reference` out")
    events.stage(f"loading the model {config.reference}")
    model = load_model(
        config.reference, max_length=config.max_length, truncate=config.truncate, device=config.device, events=events
    )
    if model.spec.task != "causal":
        raise ConfigError(
            f"reference: {config.reference} is made to {model.spec.task} and gives no likelihood of a text"
        )
    return read_answers(model, examples, events, "reference")


def _check_labels(examples: Sequence[Example], labels: Sequence[str], model: str) -> None:
    if not labels:
        return
    for example in examples:
        if not isinstance(example, Labelled) or isinstance(example.label, float):
            raise DataError(f"{example.id}: {model} was tuned to classify, and this row carries no label")
        held = example.label if isinstance(example.label, tuple) else (str(example.label),)
        unknown = [label for label in held if label not in labels]
        if unknown:
            raise DataError(
                f"{example.id}: the label {unknown[0]!r} was never learned by {model}, which knows {', '.join(labels)}; "
                "mend the row or tune with it"
            )
