"""Answers to learn from: ids in, ids out, each drawn from random numbers of its own."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from luthier.engine.beams import search
from luthier.engine.generate import engine_for, uses_engine
from luthier.engine.native import natively, own_adapter
from luthier.engine.padded import write
from luthier.engine.sampling import Sampling
from luthier.models.spec import LoadedModel

# Answers written at once: enough for fast products, few enough for the memory of their keys and values.
AT_ONCE = 64


def roll_out(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    numbers_SM: np.ndarray | None = None,
    temperature: float = 1.0,
    beams: int = 1,
) -> list[tuple[int, ...]]:
    """The answer to each prompt, in order: at most `max_tokens` ids, the last a stop token where the answer is whole.

    Without `numbers_SM` the likeliest token each time, or the likeliest of `beams` answers. With them (from 0 to 1, M of
    `max_tokens` for each answer) a token is drawn from the whole distribution at `temperature`, by its place in the
    cumulative sum, so an answer depends on its prompt and its numbers and, but for rounding, on nothing beside it. The
    model is in eval mode meanwhile; a prompt near the end of the context leaves less room.
    """
    sampling = Sampling(max_tokens=max_tokens, beams=beams, temperature=0.0 if numbers_SM is None else temperature)
    if not uses_engine(model):
        return _roll_out_padded(model, prompts, sampling, numbers_SM)
    if beams > 1:
        return [tuple(ids) for ids in search(model, prompts, sampling, max(1, AT_ONCE // beams))]
    with natively(model, len(prompts) * max_tokens):
        engine = engine_for(model, [len(ids) for ids in prompts], max_tokens, AT_ONCE)
        adapter = own_adapter(model)
        requests = [
            engine.add(ids, sampling, draw=None if numbers_SM is None else numbers_SM[at].__getitem__, adapter=adapter)
            for at, ids in enumerate(prompts)
        ]
        engine.run()
    return [tuple(one.written) for one in requests]


def _roll_out_padded(
    model: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers_SM: np.ndarray | None
) -> list[tuple[int, ...]]:
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    found: list[tuple[int, ...]] = [()] * len(prompts)
    at_once, temperature = max(1, AT_ONCE // sampling.beams), sampling.temperature
    plain = sampling.model_copy(update={"temperature": 0.0})
    for start in range(0, len(order), at_once):
        part = order[start : start + at_once]
        rows = [prompts[at] for at in part]
        drawn = None if numbers_SM is None else Draw(numbers_SM[part], max(map(len, rows)), temperature)
        for at, ids in zip(part, write(model, rows, plain, processor=drawn)):
            end = next((place for place, token in enumerate(ids) if token in model.spec.stop_ids), len(ids) - 1)
            found[at] = tuple(ids[: end + 1])
    return found


def numbers_for(seed: tuple[int, ...], name: str, sample: int, count: int) -> np.ndarray:
    """`count` numbers from 0 to 1 for one answer: the same for the same seed, row and sample, whatever is beside it."""
    return np.random.default_rng([*seed, zlib.crc32(name.encode()), sample]).random(count)


class Draw:
    """Leaves only the token that each row's number falls on: the greedy choice after it is a draw."""

    def __init__(self, numbers_SM: np.ndarray, width: int, temperature: float):
        self.numbers_SM, self.width, self.temperature = torch.from_numpy(numbers_SM), width, temperature

    def __call__(self, ids_ST: Tensor, scores_SV: Tensor) -> Tensor:
        place = ids_ST.shape[1] - self.width
        shares_SV = (scores_SV.float() / self.temperature).softmax(-1)
        sums_SV = shares_SV.cumsum(-1, dtype=torch.float64)
        number_S1 = self.numbers_SM[:, place, None].to(scores_SV.device)
        # Strictly below the last sum, so a token that cannot come is never chosen.
        token_S1 = torch.searchsorted(sums_SV, number_S1 * sums_SV[:, -1:], right=True)
        return torch.full_like(scores_SV, -torch.inf).scatter_(1, token_S1, 0.0)
