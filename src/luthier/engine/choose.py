"""The next token of each of several texts, from its logits: in the order in which transformers applies the same settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.engine.likeliest import most_likely, not_numbers
from luthier.engine.logs import likelihoods
from luthier.engine.order import order
from luthier.engine.request import Request
from luthier.engine.structure import nothing_left, restrict
from luthier.native.draws import Draw, can_draw, draw_rows

# Likeliest tokens that are looked at first for what holds a share of the probability.
FEW = 256


def choose(logits_RV: Tensor, requests: Sequence[Request]) -> list[int | Exception]:
    """A token for each row of logits (fp32), or the error that kept one text from having any. What a row gets depends on
    nothing but its logits, its text and its draw.

    First what is said of single tokens (`settled`), then the likeliest, or the temperature, the share that is drawn from
    (`shares_of`), and the draw. Each text keeps how likely its token was, where that is asked for. A text whose scores are not
    numbers gets an error.
    """
    found: dict[int, int | Exception] = {}
    formed = [at for at, one in enumerate(requests) if one.matcher is not None]
    if formed:
        # What a structure leaves may hide what is wrong with the row. All rows at once are sooner looked at than some.
        sound = logits_RV.amax(-1).isfinite().tolist()
        found = {at: not_numbers() for at in formed if not sound[at]}
    # What a structure leaves is made of all rows at once, and in place.
    raw = {
        at: logits_RV[at].clone()
        for at, one in enumerate(requests)
        if one.matcher and one.sampling.logprobs is not None
    }
    restrict(logits_RV, requests)
    plain = [
        at for at, one in enumerate(requests) if at not in found and one.sampling.temperature == 0 and untouched(one)
    ]
    if plain:
        tokens = most_likely(logits_RV[plain] if len(plain) < len(requests) else logits_RV).tolist()
        found |= {at: _judged(token, requests[at]) for at, token in zip(plain, tokens)}
    drawn = [at for at, one in enumerate(requests) if at not in found and untouched(one)]
    if drawn:
        found |= dict(zip(drawn, _draw(logits_RV, drawn, [requests[at] for at in drawn])))
    for at, one in enumerate(requests):
        if at not in found:
            try:
                found[at] = _choose(logits_RV[at], raw.get(at, logits_RV[at]), one)
            except Exception as err:
                found[at] = err
    return [found[at] for at in range(len(requests))]


def _choose(scores_V: Tensor, raw_V: Tensor, request: Request) -> int:
    if request.matcher is not None and request.matcher.error is not None:
        raise request.matcher.error
    scores_V = settled(scores_V, request)
    if request.sampling.temperature == 0:
        token = int(most_likely(scores_V[None]))
        if token < 0:
            raise _nothing(request)
    else:
        (found,) = _draw(scores_V[None], [0], [request])
        if isinstance(found, Exception):
            raise found
        token = found
    if request.sampling.logprobs is not None:
        request.logs.append(likelihoods(raw_V, _processed(scores_V, request), token, request.sampling.logprobs))
    return token


def _nothing(request: Request) -> Exception:
    """Why no token has a score: those of a text with a structure were numbers before that was applied."""
    return not_numbers() if request.matcher is None else nothing_left()


def takes_likeliest(request: Request) -> bool:
    """Whether its next token is the likeliest of the model's own logits."""
    return request.sampling.temperature == 0 and request.matcher is None and untouched(request)


def untouched(request: Request) -> bool:
    """Whether no setting changes the scores of its next token, nor asks for them."""
    sampling = request.sampling
    return not (
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or request.banned
        or len(request.written) < sampling.min_tokens
        or sampling.logprobs is not None
    )


def settled(scores_V: Tensor, request: Request) -> Tensor:
    """The scores of the next token after bias, penalties and bans: what holds whether it is drawn or not.

    Raises ConfigError where nothing is left to write.
    """
    sampling = request.sampling
    if sampling.logit_bias:
        scores_V = scores_V.index_add(0, *_pair(scores_V, sampling.logit_bias))
    if sampling.repetition_penalty != 1:
        scores_V = _penalised(scores_V, request)
    if (sampling.presence_penalty or sampling.frequency_penalty) and request.written:
        counts = Counter(request.written)
        lost = {
            token: -sampling.presence_penalty - sampling.frequency_penalty * count for token, count in counts.items()
        }
        scores_V = scores_V.index_add(0, *_pair(scores_V, lost))
    never = _never(request)
    if never:
        scores_V = scores_V.index_fill(0, torch.tensor(never, device=scores_V.device), -torch.inf)
        if scores_V.max() == -torch.inf:
            raise ConfigError("banned and min_tokens leave no token that may come; ban less")
    return scores_V


def shares_of(scores_V: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
    """What is drawn from at a temperature: the share of each token, in the order of the vocabulary, or of the likeliest
    alone with the tokens that they are, in falling order. Shares need not add up to 1."""
    sampling = request.sampling
    values_K, tokens_K = scores_V / sampling.temperature, None
    top_p = None if sampling.top_p == 1 else sampling.top_p
    if sampling.top_k is None and top_p is not None:
        shares_K, tokens_K = _first_shares(values_K, top_p)
    else:
        if sampling.top_k is not None:
            values_K, tokens_K = values_K.topk(min(sampling.top_k, len(scores_V)))
        shares_K = values_K.double().softmax(-1)
    if top_p is not None:
        # The smallest set that holds so much: a token stays while those before it hold less.
        before_K = shares_K.cumsum(-1) - shares_K
        shares_K = torch.where(before_K < top_p, shares_K, 0.0)
    if sampling.min_p is not None:
        shares_K = torch.where(shares_K >= sampling.min_p * shares_K.max(), shares_K, 0.0)
    if sampling.typical_p is not None and sampling.typical_p < 1:
        shares_K = _typical(shares_K, sampling.typical_p)
    return shares_K, tokens_K


def _first_shares(values_V: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The shares of the likeliest tokens, in falling order, and the tokens: so many that they hold `mass`, or all. Few do,
    as a rule, and to find those is sooner done than to sort a vocabulary."""
    wide_V = values_V.double()
    whole = wide_V.logsumexp(-1)
    for count in (FEW, 32 * FEW, len(values_V)):
        if count < len(values_V):
            tokens_K = values_V.topk(count).indices
        else:
            tokens_K = order(-values_V)
        shares_K = (wide_V[tokens_K] - whole).exp()
        if shares_K.sum() >= mass:
            break
    return shares_K, tokens_K


def _processed(scores_V: Tensor, request: Request) -> Tensor:
    """Scores whose shares are drawn from."""
    if request.sampling.temperature == 0:
        return scores_V
    shares_K, tokens_K = shares_of(scores_V, request)
    logs_K = shares_K.log()
    return (
        logs_K if tokens_K is None else torch.full_like(scores_V, -torch.inf).double().index_copy(0, tokens_K, logs_K)
    )


def _penalised(scores_V: Tensor, request: Request) -> Tensor:
    """Keskar et al. 2019 (arXiv:1909.05858): what occurred in prompt or answer is divided, or multiplied below zero."""
    before = request.prompt if request.opening is None else request.opening
    seen = torch.tensor(sorted({*before, *request.written}), device=scores_V.device)
    values = scores_V[seen]
    penalty = request.sampling.repetition_penalty
    return scores_V.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))


def _never(request: Request) -> list[int]:
    """Tokens that must not come: the last of a banned text whose others stand there, and end tokens that come too early."""
    found = list(request.ends) if len(request.written) < request.sampling.min_tokens else []
    for form in request.banned:
        if request.last(len(form) - 1) == list(form[:-1]):
            found.append(form[-1])
    return found


def _typical(shares_K: Tensor, mass: float) -> Tensor:
    """Meister et al. 2023 (arXiv:2202.00666): those nearest to the entropy stay, so many that they hold `mass`."""
    shares_K = shares_K / shares_K.sum()
    logs_K = shares_K.log()
    apart_K = (logs_K - (shares_K * logs_K).nansum()).abs()
    order_K = order(apart_K)
    last = int((shares_K[order_K].cumsum(-1) < mass).sum())
    return torch.where(apart_K <= apart_K[order_K[min(last, len(order_K) - 1)]], shares_K, 0.0)


def _draw(scores_RV: Tensor, rows: Sequence[int], requests: Sequence[Request]) -> list[int | Exception]:
    """The token on which the draw of each request falls in its row of settled scores, or why there is none."""
    found: dict[int, int | Exception] = {}
    asked: dict[int, Draw] = {}
    fast = can_draw(scores_RV)
    for at, (row, one) in enumerate(zip(rows, requests)):
        try:
            if fast and one.sampling.typical_p in (None, 1):
                asked[at] = _how(one)
            else:
                found[at] = drawn_from(*shares_of(scores_RV[row], one), _number(one))
        except Exception as err:
            found[at] = err
    if asked:
        found |= dict(zip(asked, draw_rows(scores_RV, [rows[at] for at in asked], list(asked.values()))))
    return [_judged(found[at], one) for at, one in enumerate(requests)]


def _judged(token: int | Exception, request: Request) -> int | Exception:
    """The token, or why none was found, where it is below 0."""
    if isinstance(token, Exception):
        return token
    if request.matcher is not None and request.matcher.error is not None:
        return request.matcher.error
    return token if token >= 0 else _nothing(request)


def _how(request: Request) -> Draw:
    sampling = request.sampling
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    return Draw(_number(request), sampling.temperature, sampling.top_k or 0, top_p, sampling.min_p or 0.0)


def _number(request: Request) -> float:
    return request.draw(len(request.written))


def drawn_from(shares_K: Tensor, tokens_K: Tensor | None, number: float) -> int:
    """The token on which a number from 0 to 1 falls; -1 where the shares are not numbers."""
    sums_K = shares_K.cumsum(-1)
    # Nothing but numbers has a sum between.
    if not 0 < float(sums_K[-1]) < torch.inf:
        return -1
    # Strictly below the last sum, so that a token that cannot come is never chosen.
    place = torch.minimum(sums_K[-1:] * number, sums_K[-1:] * (1 - 1e-12))
    at = int(torch.searchsorted(sums_K, place, right=True))
    return at if tokens_K is None else int(tokens_K[at])


def _pair(scores_V: Tensor, added: dict[int, float]) -> tuple[Tensor, Tensor]:
    """Tokens, and what is added to the score of each."""
    tokens = torch.tensor(list(added), device=scores_V.device)
    return tokens, torch.tensor(list(added.values()), device=scores_V.device, dtype=scores_V.dtype)
