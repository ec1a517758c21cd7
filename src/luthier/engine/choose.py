"""The next token of each of several texts, from its logits: in the order in which transformers applies the same settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.engine.request import Request
from luthier.engine.structure import restrict


def choose(logits_RV: Tensor, requests: Sequence[Request]) -> list[int]:
    """A token for each row of logits (fp32). What a row gets depends on nothing but its logits, its text and its draw."""
    restrict(logits_RV, requests)
    plain = [at for at, one in enumerate(requests) if one.sampling.temperature == 0]
    found: dict[int, int] = {}
    for at, one in enumerate(requests):
        if one.sampling.repetition_penalty != 1:
            logits_RV[at] = _penalised(logits_RV[at], one)
    if plain:
        found.update(zip(plain, logits_RV[plain].argmax(-1).tolist()))
    for at, one in enumerate(requests):
        if at not in found:
            found[at] = _drawn(logits_RV[at], one)
    return [found[at] for at in range(len(requests))]


def _penalised(logits_V: Tensor, request: Request) -> Tensor:
    """Keskar et al. 2019 (arXiv:1909.05858): what occurred in prompt or answer is divided, or multiplied below zero."""
    seen = torch.tensor(sorted({*request.prompt, *request.written}), device=logits_V.device)
    values = logits_V[seen]
    penalty = request.sampling.repetition_penalty
    return logits_V.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))


def _drawn(logits_V: Tensor, request: Request) -> int:
    """The token on which the draw falls, in the order of the vocabulary; among the likeliest alone, in falling order."""
    sampling = request.sampling
    values_K, tokens_K = logits_V / sampling.temperature, None
    if sampling.top_k is not None or sampling.top_p is not None:
        values_K, tokens_K = values_K.topk(min(sampling.top_k or len(logits_V), len(logits_V)))
    shares_K = values_K.double().softmax(-1)
    if sampling.top_p is not None:
        # The smallest set that holds so much: a token stays while those before it hold less.
        before_K = shares_K.cumsum(-1) - shares_K
        shares_K = torch.where(before_K < sampling.top_p, shares_K, 0.0)
    if sampling.min_p is not None:
        shares_K = torch.where(shares_K >= sampling.min_p * shares_K.max(), shares_K, 0.0)
    sums_K = shares_K.cumsum(-1)
    number = sums_K[-1:] * request.draw(len(request.written))
    # Strictly below the last sum, so that a token that cannot come is never chosen.
    at = int(torch.searchsorted(sums_K, torch.minimum(number, sums_K[-1:] * (1 - 1e-12)), right=True))
    return at if tokens_K is None else int(tokens_K[at])
