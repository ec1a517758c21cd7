"""Answers of classifiers and regressors: one forward pass a text, no decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from luthier.core.errors import ModelError
from luthier.core.types import Encoded, Prediction
from luthier.data.batches import collate
from luthier.models.spec import LoadedModel


def predict(
    model: LoadedModel,
    items: Sequence[tuple[str, str | None]],
    *,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """A prediction for each (text, second text or None), in order; its id is the item's place.

    A classifier gives a class and the probability of each; with several labels a row, all above one half; a regressor
    a number in the unit of its data. Texts of like length share a batch. Raises ModelError for other models, and
    DataError for a text that is too long.
    """
    spec = model.spec
    if spec.task not in ("classify", "regress"):
        raise ModelError(f"{spec.source}: this model is made to {spec.task}, not to classify or to give numbers")
    rows = [model.renderer.labelled(text, pair, id=str(at)) for at, (text, pair) in enumerate(items)]
    scores_NC = score_rows(model, rows, batch_size=batch_size, on_progress=on_progress)
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
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Raw scores [N, C] in fp32 on the CPU, in the order of `rows`."""
    training = model.module.training
    model.module.eval()
    order = sorted(range(len(rows)), key=lambda at: len(rows[at].ids))
    scores: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    pad = model.tokenizer.pad_token_id or 0
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = collate([rows[at] for at in part], pad).to(model.device)
            for at, row in zip(part, model.module(batch.ids_BT, batch.mask_BT).float().cpu()):
                scores[at] = row
            if on_progress is not None:
                on_progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.module.train(training)
    return torch.stack(scores)
