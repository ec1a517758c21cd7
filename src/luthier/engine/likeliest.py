"""The likeliest token of rows of logits, and what is said where these are no numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.core.errors import ModelError


def most_likely(logits_RV: Tensor) -> Tensor:
    """[R]: the likeliest token of each row; -1 where that is no number: one that is nan or infinite is found largest, and
    of numbers infinite below only where all are."""
    tokens_R = logits_RV.argmax(-1)
    return torch.where(logits_RV.gather(-1, tokens_R[:, None])[:, 0].isfinite(), tokens_R, -1)


def not_numbers() -> ModelError:
    """What ends a text of which the model says nothing."""
    return ModelError(
        "the model's logits are not numbers (nan or infinite): its weights or its adapter are damaged, or too large for their "
        "dtype; use an earlier checkpoint"
    )
