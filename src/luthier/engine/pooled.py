"""Answers of classifiers and regressors, and vectors of any model: one forward pass a text, no decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from luthier.core.errors import ModelError
from luthier.core.events import Events
from luthier.core.types import Encoded, Message, Prediction
from luthier.data.batches import fill_batches
from luthier.data.cache import lengths_of
from luthier.engine import pooler
from luthier.engine.answers import encode_scored, gives_rewards
from luthier.engine.passes import TOKENS, plan_tokens
from luthier.engine.pooler import Embedding, Pooler, Reading
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
    rows = [encode_item(model, item, str(at)) for at, item in enumerate(items)]
    scores_NC = score_rows(model, rows, tokens=tokens, on_progress=on_progress, events=events)
    return [prediction_of(model, scores_C, row.id, item) for row, scores_C, item in zip(rows, scores_NC, items)]


def prediction_of(model: LoadedModel, scores_C: Tensor, id: str, item: Item) -> Prediction:
    """What raw scores [C] say of an item."""
    spec = model.spec
    shown = "\n".join(part.content if isinstance(part, Message) else part for part in item if part is not None)
    if spec.task == "regress":
        return Prediction(id, float(scores_C[0]) * spec.target_scale + spec.target_mean, input=shown)
    if spec.multi_label:
        shares = dict(zip(spec.labels, scores_C.sigmoid().tolist()))
        held = tuple(label for label, share in shares.items() if share > 0.5)
        return Prediction(id, held, probabilities=shares, input=shown)
    shares = dict(zip(spec.labels, scores_C.softmax(-1).tolist()))
    return Prediction(id, max(shares, key=lambda label: shares[label]), probabilities=shares, input=shown)


def embed(
    model: LoadedModel,
    texts: Sequence[str],
    embedding: Embedding | None = None,
    *,
    tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    events: Events | None = None,
) -> Tensor:
    """A vector [S, E] of each text, in fp32 on the CPU, in order; `tokens` go through the model at once.

    Each text is read as the model's tokenizer frames it. Raises DataError for a text that is too long, ConfigError for settings
    that this model cannot follow.
    """
    embedding = embedding or Embedding()
    rows = [model.renderer.framed(text, str(at)) for at, text in enumerate(texts)]
    return _read(Pooler(model, tokens=tokens or TOKENS, events=events), rows, embedding, on_progress)


def encode_item(model: LoadedModel, item: Item, id: str = "") -> Encoded:
    """An item as a classifier, regressor or reward model reads it. Raises DataError."""
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
    """Raw scores [S, C] in fp32 on the CPU, in the order of `rows`; `tokens` go through the model at once, where nobody says,
    with `events`, the most that are predicted to fit."""
    if tokens is None:
        tokens = TOKENS if events is None or not rows else plan_tokens(model, rows, pooler.score_batch, events)
    return _read(Pooler(model, tokens=tokens, events=events), rows, None, on_progress)


def _read(
    engine: Pooler,
    rows: Sequence[Encoded],
    embedding: Embedding | None,
    on_progress: Callable[[int, int], None] | None,
) -> Tensor:
    """[S, C]: what comes of each row, those of like length together."""
    found: dict[int, Reading] = {}
    for part in fill_batches(lengths_of(rows), engine.tokens):
        # A few wait at a time: to put many in order takes longer than to read them.
        found.update((at, engine.pool(rows[at].ids, embedding)) for at in part)
        engine.run()
        if on_progress is not None:
            on_progress(len(found), len(rows))
    return torch.stack([one.found for _, one in sorted(found.items()) if one.found is not None])
