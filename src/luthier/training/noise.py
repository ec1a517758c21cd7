"""Noise on the input embeddings while a model learns."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from luthier.core.errors import TrainingError
from luthier.data.batches import Batch
from luthier.models.packed import pad
from luthier.models.spec import LoadedModel


@contextmanager
def noisy_inputs(model: LoadedModel, batch: Batch, alpha: float, seed: tuple[int, ...]) -> Iterator[None]:
    """Inside, the embeddings of the tokens of `batch` carry noise wherever a gradient is wanted.

    NEFTune (Jain et al. 2023, arXiv:2310.05914): uniform between -1 and 1, times alpha / sqrt(L d) for a segment of L
    tokens and d values a token. Of an encoder-decoder, the encoder's embeddings. Each segment's noise is drawn from
    `seed` (the run's and the step) and its own tokens, so how a step is split changes nothing, and a text that is repeated
    in front of several others carries the same in each; two equal texts in one step carry equal noise. Raises
    TrainingError when the model never looked up the tokens of the batch.
    """
    if alpha == 0:
        yield
        return
    network: Any = model.network
    body = network.get_encoder() if model.spec.kind == "encoder-decoder" else network
    met = False

    def add(module: Any, inputs: tuple[Any, ...], states: Tensor) -> Tensor | None:
        nonlocal met
        ids = inputs[0]
        if not torch.is_grad_enabled():
            return None
        if states.is_meta:  # a rehearsal: nobody can tell the tokens
            met = True
            return states + torch.empty_like(states)
        layout = _layout(batch, ids)
        if layout is None:
            return None
        met = True
        pieces = batch.ids_N.split(list(batch.lengths))  # type: ignore[no-untyped-call]
        drawn = [draw_noise(piece, states.shape[-1], alpha, seed) for piece in pieces]
        texts = [torch.cat([drawn[at] for at in text]) for text in layout]
        noise = pad(torch.cat(texts), [len(text) for text in texts], 0.0) if len(ids) > 1 else torch.cat(texts)[None]
        return states + noise.to(states)

    hook = body.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
    if not met:
        raise TrainingError(
            f"noise: this {model.spec.family} model did not look up the tokens of the batch as they lie in it, so no noise "
            "was added; leave noise at 0"
        )


def draw_noise(ids_L: Tensor, width: int, alpha: float, seed: tuple[int, ...]) -> Tensor:
    """[L, width] on the CPU, the same for the same tokens and seed on any device."""
    key = hashlib.blake2b(repr(seed).encode() + ids_L.cpu().numpy().tobytes(), digest_size=8)
    generator = torch.Generator().manual_seed(int.from_bytes(key.digest(), "little", signed=True))
    size = alpha / math.sqrt(len(ids_L) * width)
    return torch.rand(len(ids_L), width, generator=generator).mul_(2 * size).sub_(size)


def _layout(batch: Batch, ids: Tensor) -> list[list[int]] | None:
    """Which segments make up each text of a call with `ids` [rows, T]; None when it is a call with other tokens."""
    pieces = batch.ids_N.split(list(batch.lengths))  # type: ignore[no-untyped-call]
    layouts = [[[at] for at in range(len(pieces))]]
    if batch.parents:
        layouts.append([[up, at] if up >= 0 else [at] for at, up in enumerate(batch.parents)])
    for layout in layouts:
        texts = [torch.cat([pieces[at] for at in text]) for text in layout]
        if _holds(ids, texts):
            return layout
    return None


def _holds(ids: Tensor, texts: Sequence[Tensor]) -> bool:
    """Whether `ids` are `texts` end to end in one row, or side by side with padding to their right."""
    if len(ids) == 1 and ids.shape[1] == sum(len(text) for text in texts):
        return torch.equal(ids[0], torch.cat(list(texts)))
    if len(ids) != len(texts) or ids.shape[1] != max(len(text) for text in texts):
        return False
    return all(torch.equal(row[: len(text)], text) for row, text in zip(ids, texts))
