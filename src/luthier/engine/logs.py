"""How likely tokens were: by the model, and by what was drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.core.types import TokenLog
from luthier.engine.likeliest import not_numbers
from luthier.engine.request import Likelihoods, Request
from luthier.models.spec import LoadedModel

# Tokens before one that its text is read with: alone, a word of SentencePiece would lose the space in front.
BEFORE = 4


def likelihoods(raw_V: Tensor, processed_V: Tensor, token: int, count: int) -> Likelihoods:
    """Of `token` and of the `count` likeliest by `raw_V`, all scores before they are made shares."""
    tokens_K = torch.cat([torch.tensor([token], device=raw_V.device), raw_V.topk(count).indices])
    raw_K, processed_K = (one.double().log_softmax(-1)[tokens_K].tolist() for one in (raw_V, processed_V))
    return Likelihoods(tokens_K.tolist(), raw_K, processed_K)


def prompt_logs(logits_RV: Tensor, following: Sequence[int]) -> list[float]:
    """The log-probability of the token that followed each row. Raises ModelError for rows that are not numbers."""
    tokens_R1, whole_R = torch.tensor(following, device=logits_RV.device)[:, None], logits_RV.logsumexp(-1)
    if not whole_R.isfinite().all():
        raise not_numbers()
    return (logits_RV.gather(1, tokens_R1)[:, 0] - whole_R).tolist()


def tops(logits_RV: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The `count` likeliest tokens of each row, with their log-probabilities."""
    values_RK, tokens_RK = logits_RV.topk(count, dim=-1)
    shares_RK = values_RK - logits_RV.logsumexp(-1, keepdim=True)
    return [list(zip(*row)) for row in zip(tokens_RK.tolist(), shares_RK.tolist())]


def logs_of(model: LoadedModel, request: Request, stop: int, start: int = 0) -> tuple[TokenLog, ...]:
    """Of the tokens that were written, from one place to another."""
    found = []
    for at, (tokens, raw, processed) in enumerate(request.logs[start:stop], start):
        before = request.written[max(0, at - BEFORE) : at]
        chosen, *top = [
            TokenLog(token, added(model, before, token), one, other)
            for token, one, other in zip(tokens, raw, processed)
        ]
        found.append(TokenLog(chosen.id, chosen.text, chosen.raw, chosen.processed, tuple(top)))
    return tuple(found)


def added(model: LoadedModel, before: Sequence[int], token: int) -> str:
    """The text that a token adds; a special one shows itself."""
    if token in model.tokenizer.all_special_ids:
        return str(model.tokenizer.decode([token], skip_special_tokens=False))
    head, whole = model.renderer.decode(before).rstrip("\ufffd"), model.renderer.decode([*before, token])
    return whole[len(head) :] if whole.startswith(head) else model.renderer.decode([token])
