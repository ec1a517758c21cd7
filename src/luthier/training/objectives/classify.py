"""Learn to sort texts into classes: two, many, or several at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from luthier.core.errors import ConfigError, DataError, did_you_mean
from luthier.core.events import Events
from luthier.core.types import Encoded, Example, Labelled, Task
from luthier.data.batches import Batch
from luthier.engine.pooler import score_batch
from luthier.models.spec import LoadedModel
from luthier.training.losses import LOSSES
from luthier.training.losses.cross_entropy import CrossEntropy, balance
from luthier.training.losses.part import Loss as RowLoss
from luthier.training.objectives.part import Loss, Objective, encode_rows

# Weights shift errors to the common classes: on SMS spam (one in seven) they cost an encoder precision and F1. Below this
# share of an even one a class would otherwise hardly be learned.
UNEVEN = 10


class Classify(Objective):
    """Scores for each class from one pooled vector.

    Two or more classes compete in a softmax; when rows hold lists of labels, each class is its own yes or no.
    """

    kind: ClassVar[str] = "classify"
    wants: ClassVar[tuple[type, ...]] = (Labelled,)
    task: ClassVar[Task | None] = "classify"
    metric: ClassVar[tuple[str, int]] = ("macro_f1", +1)

    loss: LOSSES.field_or_auto = "auto"  # type: ignore[name-defined]
    """How wrong a row is: cross_entropy (smoothing, class_weights), focal (gamma, class_weights), or auto."""

    def load_options(self, train: Sequence[Example]) -> dict[str, Any]:
        several = any(isinstance(example, Labelled) and isinstance(example.label, tuple) for example in train)
        return {"task": self.task, "labels": label_names(count_labels(train)), "multi_label": several}

    def prepare(self, train: Sequence[Example], events: Events) -> Classify:
        self.check_examples(train)
        counts = count_labels(train)
        if len(counts) < 2:
            raise DataError(
                f"all {len(train)} training rows have the label {next(iter(counts), None)!r}; "
                "a classifier needs two classes or more"
            )
        loss: RowLoss | str = self.loss
        if loss == "auto":
            rare, share = min(counts, key=lambda name: counts[name]), min(counts.values()) / sum(counts.values())
            uneven = share < 1 / (UNEVEN * len(counts))
            loss = CrossEntropy(class_weights="auto" if uneven else "none")
            why = f"the rarest of {len(counts)} classes, {rare!r}, has {share:.1%} of the labels"
            named = "cross-entropy with balanced class weights" if uneven else "plain cross-entropy"
            events.choose("loss", named, f"{why}, {'less' if uneven else 'no less'} than a {UNEVEN}th of an even share")
        if not isinstance(loss, RowLoss) or loss.fits != "classes":
            raise ConfigError(
                f"objective.loss: {getattr(loss, 'kind', loss)!r} is for numbers; classes take 'cross_entropy' or 'focal'"
            )
        weights = getattr(loss, "class_weights", "none")
        if isinstance(weights, dict):
            for name in weights:
                if name not in counts:
                    raise ConfigError(
                        f"objective.loss.class_weights: no class is called {name!r}; {did_you_mean(name, counts)}"
                    )
        elif weights == "auto":
            loss = loss.model_copy(update={"class_weights": balance(counts)})
        return self.model_copy(update={"loss": loss})

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        labels, many = model.spec.labels, model.spec.multi_label
        weights = getattr(self.loss, "class_weights", "none")
        weights = weights if isinstance(weights, dict) else {}
        index = {label: at for at, label in enumerate(labels)}

        def encode(example: Labelled) -> Encoded:
            held = example.label if isinstance(example.label, tuple) else (str(example.label),)
            unknown = [label for label in held if label not in index]
            if unknown:
                raise DataError(
                    f"{example.id}: the label {unknown[0]!r} is not among those learned: {', '.join(labels)}"
                )
            row = model.renderer.labelled(example.text, example.pair, id=example.id)
            gold = tuple(float(label in held) for label in labels) if many else index[held[0]]
            weight = float(example.meta.get("weight", 1.0))
            # A row with several labels weighs as the mean of its classes; with none, as an ordinary row.
            if held:
                weight *= sum(weights.get(label, 1.0) for label in held) / len(held)
            return replace(row, id=example.id, weights=(), gold=gold, weight=weight)

        return encode_rows(examples, encode, events, renderer=model.renderer)

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        scores_SC = score_batch(model, batch)
        assert isinstance(self.loss, RowLoss) and batch.row_weights_S is not None and batch.gold is not None
        return Loss((self.loss.rows(scores_SC, batch.gold) * batch.row_weights_S).sum(), batch.weight), scores_SC

    def metrics(self, scores: Tensor, gold: Tensor, model: LoadedModel) -> dict[str, float]:
        if gold.ndim == 2:
            chosen = (scores > 0).float()
            each = [macro_f1(chosen[:, at], gold[:, at], positive_only=True) for at in range(gold.shape[1])]
            return {"accuracy": float((chosen == gold).all(-1).float().mean()), "macro_f1": sum(each) / len(each)}
        guess = scores.argmax(-1)
        return {"accuracy": float((guess == gold).float().mean()), "macro_f1": macro_f1(guess, gold)}


def macro_f1(guess_N: Tensor, gold_N: Tensor, *, positive_only: bool = False) -> float:
    """Unweighted mean of F1 = 2 x hits / (guessed + gold) over the classes that occur; or of class 1 alone."""
    classes = [1] if positive_only else sorted({*guess_N.tolist(), *gold_N.tolist()})
    each = []
    for name in classes:
        hits = int(((guess_N == name) & (gold_N == name)).sum())
        total = int((guess_N == name).sum() + (gold_N == name).sum())
        each.append(2 * hits / total if total else 0.0)
    return sum(each) / len(each)


def label_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their indices: numbers by value, then the others by name."""

    def key(name: str) -> tuple[bool, int, str]:
        number = name.lstrip("-").isdigit()
        return not number, int(name) if number else 0, name

    return tuple(sorted(labels, key=key))


def count_labels(examples: Sequence[Example]) -> dict[str, int]:
    """How often each label occurs, by falling count."""
    counts: Counter[str] = Counter()
    for example in examples:
        assert isinstance(example, Labelled)
        counts.update(example.label if isinstance(example.label, tuple) else (str(example.label),))
    return dict(counts.most_common())
