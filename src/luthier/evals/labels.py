"""Labelled rows to predictions of a language model, which chooses among the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Example, Labelled, Prediction
from luthier.engine.labelling import Labelling
from luthier.engine.labels import Labeller
from luthier.evals.baselines.part import whole_text
from luthier.models.spec import LoadedModel
from luthier.text.labels import Shots


def choose_labels(examples: Sequence[Example], labels: Sequence[str], events: Events | None = None) -> tuple[str, ...]:
    """The labels to choose among: those given, else those of the rows.

    Raises DataError for rows that carry no label, several, a number, or one that is not among the labels.
    """
    golds = []
    for example in examples:
        if not isinstance(example, Labelled) or not isinstance(example.label, str):
            raise DataError(
                f"{example.id}: a language model chooses one label a row, and this row does not carry just one; mend it"
            )
        if labels and example.label not in labels:
            raise DataError(
                f"{example.id}: the label {example.label!r} is not among {', '.join(labels)}; mend the row, or add it to labels"
            )
        golds.append(example.label)
    if labels:
        return tuple(labels)
    found = tuple(sorted(set(golds)))
    if len(found) < 2:
        raise DataError(f"these rows carry the label {found[0]!r} alone; name all that there are with labels")
    if events is not None:
        events.choose("labels", ", ".join(found), "the rows carry these")
    return found


def predict_labels(
    model: LoadedModel,
    examples: Sequence[Example],
    labels: Sequence[str],
    labelling: Labelling | None = None,
    *,
    shots: Shots = (),
    events: Events | None = None,
) -> list[Prediction]:
    """A prediction for each labelled row, in order, with its gold."""

    def tell(done: int, total: int) -> None:
        if events is not None:
            events.emit("progress", name="judging", done=done, total=total)

    rows = [example for example in examples if isinstance(example, Labelled)]
    labeller = Labeller(model, labels, labelling, shots=shots, events=events)
    found = labeller.predict([(row.id, whole_text(row)) for row in rows], tell)
    return [replace(one, gold=row.label) for one, row in zip(found, rows)]
