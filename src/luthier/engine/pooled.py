"""Answers of classifiers and regressors: one forward pass a text, no decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from luthier.core.errors import ModelError
from luthier.core.types import Encoded, Prediction
from luthier.data.batches import Batch, collate, fill_batches
from luthier.engine.likelihood import TOKENS
from luthier.models.packed import hidden_states
from luthier.models.spec import LoadedModel


def predict(
    model: LoadedModel,
    items: Sequence[tuple[str, str | None]],
    *,
    tokens: int = TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """A prediction for each (text, second text or None), in order; its id is the item's place.

    A classifier gives a class and the probability of each; with several labels a row, all above one half; a regressor
    a number in the unit of its data. `tokens` go through the model at once. Raises ModelError for other models, and
    DataError for a text that is too long.
    """
    spec = model.spec
    if spec.task not in ("classify", "regress"):
        raise ModelError(f"{spec.source}: this model is made to {spec.task}, not to classify or to give numbers")
    rows = [model.renderer.labelled(text, pair, id=str(at)) for at, (text, pair) in enumerate(items)]
    scores_NC = score_rows(model, rows, tokens=tokens, on_progress=on_progress)
    found = []
    for row, scores_C, (text, pair) in zip(rows, scores_NC, items):
        shown = text if pair is None else f"{text}\n{pair}"
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


@torch.no_grad()
def score_rows(
    model: LoadedModel,
    rows: Sequence[Encoded],
    *,
    tokens: int = TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Raw scores [S, C] in fp32 on the CPU, in the order of `rows`; `tokens` go through the model at once."""
    training = model.module.training
    model.module.eval()
    scores: list[Tensor] = [torch.empty(0)] * len(rows)
    done = 0
    try:
        for part in fill_batches([len(row.ids) for row in rows], tokens):
            batch = collate([rows[at] for at in part]).to(model.device)
            for at, score_C in zip(part, score_batch(model, batch).float().cpu()):
                scores[at] = score_C
            done += len(part)
            if on_progress is not None:
                on_progress(done, len(rows))
    finally:
        model.module.train(training)
    return torch.stack(scores)


def score_batch(model: LoadedModel, batch: Batch) -> Tensor:
    """Raw scores [S, C] in fp32 of a classifier's or regressor's rows."""
    hidden_NE = hidden_states(model, batch.ids_N, batch.lengths)
    return model.module.score(hidden_NE, batch.lengths)  # type: ignore[operator,no-any-return]
