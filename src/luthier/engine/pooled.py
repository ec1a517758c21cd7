"""Answers of classifiers and regressors: one forward pass a text, no decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from luthier.core.errors import ModelError
from luthier.core.events import Events
from luthier.core.types import Encoded, Message, Prediction
from luthier.data.batches import Batch
from luthier.engine.answers import encode_scored, gives_rewards
from luthier.engine.passes import run_rows
from luthier.models.packed import hidden_states
from luthier.models.spec import LoadedModel

Item: TypeAlias = tuple[str, str | None] | tuple[Message, ...]
"""A text with a second one or none; for a reward model a prompt and an answer, an answer alone, or a conversation."""


def predict(
    model: LoadedModel,
    items: Sequence[Item],
    *,
    tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    events: Events | None = None,
) -> list[Prediction]:
    """A prediction for each item, in order; its id is the item's place.

    A classifier gives a class and the probability of each; with several labels a row, all above one half; a regressor
    a number in the unit of its data. `tokens` go through the model at once. Raises ModelError for other models, and
    DataError for a text that is too long.
    """
    spec = model.spec
    if spec.task not in ("classify", "regress"):
        raise ModelError(f"{spec.source}: this model is made to {spec.task}, not to classify or to give numbers")
    rows = [_encode(model, item, str(at)) for at, item in enumerate(items)]
    scores_NC = score_rows(model, rows, tokens=tokens, on_progress=on_progress, events=events)
    found = []
    for row, scores_C, item in zip(rows, scores_NC, items):
        shown = "\n".join(part.content if isinstance(part, Message) else part for part in item if part is not None)
        if spec.task == "regress":
            value = float(scores_C[0]) * spec.target_scale + spec.target_mean
            found.append(Prediction(row.id, value, input=shown))
        elif spec.multi_label:
            shares = dict(zip(spec.labels, scores_C.sigmoid().tolist()))
            held = tuple(label for label, share in shares.items() if share > 0.5)
            found.append(Prediction(row.id, held, probabilities=shares, input=shown))
        else:
            shares = dict(zip(spec.labels, scores_C.softmax(-1).tolist()))
            found.append(
                Prediction(row.id, max(shares, key=lambda label: shares[label]), probabilities=shares, input=shown)
            )
    return found


def _encode(model: LoadedModel, item: Item, id: str) -> Encoded:
    if gives_rewards(model):
        return encode_scored(model, item, id)
    texts = [part.content if isinstance(part, Message) else part for part in item]
    if isinstance(item[0], Message):
        return model.renderer.labelled("\n".join(str(text) for text in texts), id=id)
    return model.renderer.labelled(str(texts[0]), texts[1], id=id)


def score_rows(
    model: LoadedModel,
    rows: Sequence[Encoded],
    *,
    tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    events: Events | None = None,
) -> Tensor:
    """Raw scores [S, C] in fp32 on the CPU, in the order of `rows`; `tokens` go through the model at once."""
    scores: list[Tensor] = [torch.empty(0)] * len(rows)

    def keep(part: list[int], scores_SC: Tensor) -> None:
        for at, score_C in zip(part, scores_SC.float().cpu()):
            scores[at] = score_C

    run_rows(model, rows, score_batch, keep, tokens=tokens, on_progress=on_progress, events=events)
    return torch.stack(scores)


def score_batch(model: LoadedModel, batch: Batch) -> Tensor:
    """Raw scores [S, C] in fp32 of a classifier's or regressor's rows."""
    hidden_NE = hidden_states(model, batch.ids_N, batch.lengths)
    return model.module.score(hidden_NE, batch.lengths)  # type: ignore[operator,no-any-return]
