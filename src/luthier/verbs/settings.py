"""The settings of a tuning: those that do not go together, and those that were left to us."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from luthier.choice import defaults
from luthier.core.errors import ConfigError, DataError
from luthier.data.load import Dataset
from luthier.data.mix import weights_of
from luthier.training.schedules import SCHEDULES

if TYPE_CHECKING:
    from luthier.training.learner import Settings
    from luthier.training.objectives.part import Objective
    from luthier.verbs.tune import Tune
    from luthier.verbs.work import Work

# Rows of a stream, as far as choices by their number go.
MANY = 1_000_000


def check(config: Tune) -> None:
    """Raises ConfigError for settings that do not go together, before anything is read."""
    _check_rate(config)
    _check_stream(config)
    _check_order(config)


def decide(work: Work) -> Settings:
    """How long, how much at a time and how often to look: what was asked, and where that is "auto" what suits the rows."""
    from luthier.models.facts import count_parameters
    from luthier.training.learner import Settings

    config, kind = work.config, work.objective.kind
    if config.batch_size == "auto":
        size, why = defaults.choose_batch_size(MANY if work.dataset.stream else len(work.rows), kind)
        work.advise("batch_size", size, why)
    if config.steps is None and config.epochs == "auto":
        epochs, why = defaults.choose_epochs(len(work.rows), kind)
        work.advise("epochs", epochs, why)
    if config.learning_rate == "auto":
        count = count_parameters(work.model.module)
        rate, why = defaults.choose_learning_rate(count, config.adapter.kind, kind, config.from_scratch)
        values = sum(parameter.numel() for _, parameter in work.parameters)
        rate, why = defaults.suit_optimizer(rate, why, config.optimizer, values)
        if config.rate_multiplier != 1:
            rate = float(f"{rate * config.rate_multiplier:.3g}")
            why = f"{why}, times {config.rate_multiplier:g} as asked"
        work.advise("learning_rate", rate, why)
    if config.optimizer.schedule and work.asked.origin("schedule") == "default":
        why = f"{config.optimizer.kind} averages the weights in place of a falling rate"
        work.advise("schedule", SCHEDULES.parse(config.optimizer.schedule), why, shown=config.optimizer.schedule)
    config = work.config
    an_epoch = math.ceil(len(work.rows) / int(config.batch_size)) * work.objective.repeats()
    steps = config.steps or max(1, round(float(config.epochs) * an_epoch))
    an_epoch = steps if work.dataset.stream else an_epoch
    if config.validate_every in ("auto", "epoch"):
        every, why = (
            defaults.choose_validation(steps, an_epoch)
            if config.validate_every == "auto"
            else (an_epoch, "once an epoch")
        )
        work.advise("validate_every", every, why)
    config = work.config
    return Settings(
        steps=steps,
        batch_size=int(config.batch_size),
        accumulate=config.accumulate,
        micro_tokens=1 if config.micro_tokens == "auto" else config.micro_tokens,
        learning_rate=float(config.learning_rate),
        clip=config.clip,
        validate_every=int(config.validate_every),
        patience=config.patience,
        checkpoint_every=None if config.checkpoint_every == "auto" else config.checkpoint_every,
        seed=config.seed,
        ema=config.ema,
        noise=config.noise,
    )


def _check_rate(config: Tune) -> None:
    if config.rate_multiplier != 1 and config.learning_rate != "auto":
        raise ConfigError(
            "rate_multiplier: moves the rate that auto chooses, and learning_rate gives one; set one of the two"
        )


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


def check_sources(dataset: Dataset, objective: Objective) -> None:
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
