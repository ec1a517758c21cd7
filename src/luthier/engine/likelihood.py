"""How likely a model finds given tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.batches import Batch
from luthier.engine.likeliest import not_numbers
from luthier.engine.passes import run_rows
from luthier.models.cross_entropy import token_nll
from luthier.models.output import decoder_states, head_of
from luthier.models.packed import hidden_states, inside, mask_of, pad
from luthier.models.spec import LoadedModel

Scored: TypeAlias = tuple[Tensor, Tensor, list[int]]


def score(
    model: LoadedModel,
    rows: Sequence[Encoded],
    *,
    tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    events: Events | None = None,
) -> list[tuple[float, float]]:
    """(sum of weight x -log p in nats, sum of weights) of each row, in order; fp32, whatever the batch.

    Decoder-only models and encoder-decoders; `tokens` go through the model at once. Raises ModelError for others, and for
    logits that are not numbers.
    """
    if model.spec.task not in ("causal", "seq2seq"):
        raise ModelError(
            f"{model.spec.source}: this model is made to {model.spec.task}, and gives no likelihood of a text"
        )
    found: list[tuple[float, float]] = [(0.0, 0.0)] * len(rows)

    def keep(part: list[int], scored: Scored) -> None:
        nll_N, weights_N, sizes = scored
        nll: Any = nll_N.cpu()
        weights: Any = weights_N.double().cpu()
        for at, nll_T, weights_T in zip(part, nll.split(sizes), weights.split(sizes)):
            found[at] = (float((nll_T.double() * weights_T).sum()), float(weights_T.sum()))
            if math.isnan(found[at][0]):
                raise not_numbers()

    run_rows(model, rows, score_batch, keep, tokens=tokens, on_progress=on_progress, events=events)
    return found


def score_batch(model: LoadedModel, batch: Batch) -> Scored:
    """(-log p of each token, 0 where it weighs nothing; its weight; the tokens of each row)."""
    if batch.target_M is not None:
        assert batch.target_weights_M is not None
        nll_M = token_nll(head_of(model), target_states(model, batch), batch.target_M)
        return nll_M, batch.target_weights_M, list(batch.target_lengths)
    hidden_NE = hidden_states(model, batch.ids_N, batch.lengths)
    places_M = batch.places_M
    nll_N = torch.zeros(len(batch.ids_N), device=hidden_NE.device)
    nll_N[places_M] = token_nll(head_of(model), hidden_NE[places_M - 1], batch.ids_N[places_M])
    return nll_N, batch.weights_N, list(batch.lengths)


def target_states(model: LoadedModel, batch: Batch) -> Tensor:
    """[M, E]: the states of an encoder-decoder that predict each target token, given the source and the target so far.

    Raises ConfigError for a model that does not say how its decoder starts.
    """
    assert batch.target_M is not None
    config = model.network.config
    start = config.decoder_start_token_id
    if start is None:
        raise ConfigError(
            "the model's config.json has no decoder_start_token_id, so its decoder cannot be started; set it"
        )
    fill = model.tokenizer.pad_token_id or 0
    # Teacher forcing: the decoder sees the target one place later, from its start token on.
    shifted_ST = pad(batch.target_M, batch.target_lengths, fill).roll(1, dims=1)
    shifted_ST[:, 0] = start
    ids_ST, mask_ST = pad(batch.ids_N, batch.lengths, fill), mask_of(batch.lengths, model.device)
    return inside(decoder_states(model.network, ids_ST, mask_ST, shifted_ST), batch.target_lengths)
