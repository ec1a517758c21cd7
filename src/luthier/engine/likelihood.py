"""How likely a model finds given tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from luthier.core.errors import ModelError
from luthier.core.types import Encoded
from luthier.data.batches import collate
from luthier.models.spec import LoadedModel


@torch.no_grad()
def score(
    model: LoadedModel,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, float]]:
    """(sum of weight x -log p in nats, sum of weights) of each row, in order; fp32, whatever the batch.

    Decoder-only models and encoder-decoders. Raises ModelError for others.
    """
    task = model.spec.task
    if task not in ("causal", "seq2seq"):
        raise ModelError(f"{model.spec.source}: this model is made to {task}, and gives no likelihood of a text")
    training = model.module.training
    model.module.eval()
    order = sorted(range(len(rows)), key=lambda at: len(rows[at].ids) + len(rows[at].target))
    found: list[tuple[float, float]] = [(0.0, 0.0)] * len(rows)
    pad = model.tokenizer.pad_token_id or 0
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = collate([rows[at] for at in part], pad).to(model.device)
            if task == "seq2seq":
                assert batch.target_BS is not None and batch.target_weights_BS is not None
                shifted_BS = batch.target_BS.roll(1, dims=1)
                shifted_BS[:, 0] = model.module.config.decoder_start_token_id
                logits_BTV = model.module(
                    input_ids=batch.ids_BT, attention_mask=batch.mask_BT, decoder_input_ids=shifted_BS, use_cache=False
                ).logits
                gold_BT, weights_BT = batch.target_BS, batch.target_weights_BS
            else:
                logits_BTV = model.module(input_ids=batch.ids_BT, use_cache=False).logits[:, :-1]
                gold_BT, weights_BT = batch.ids_BT[:, 1:], batch.weights_BT[:, 1:]
            for at, logits_TV, gold_T, weights_T in zip(part, logits_BTV, gold_BT, weights_BT):
                counted = weights_T > 0
                nll_N = F.cross_entropy(logits_TV[counted].float(), gold_T[counted], reduction="none")
                weight_N = weights_T[counted].double()
                found[at] = (float((nll_N.double() * weight_N).sum()), float(weight_N.sum()))
            if on_progress is not None:
                on_progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.module.train(training)
    return found
