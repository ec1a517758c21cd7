"""The softmax of attention over segments side by side, in place, over the C kernels of softmax.h.

Scores [S, H, T, K]: of T places with the own tokens of a segment to K places, of which the first K - T hold what stands
before it, right-aligned. `sizes` [2, S] says how many of each hold tokens. What a token does not see gets 0, and so does
all of a place without a token. A token sees what is up to it, or all where it is not `causal`, and no further than `window - 1`
places away. Contiguous, on the CPU, in bf16 or fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.native.layers import kernel, usable

# Places of a row that the kernels have room for (BLOCK in kernels.c).
LONGEST = 4096


def can_see(scores: Tensor) -> bool:
    """Whether the kernels can take these scores."""
    return scores.shape[-1] <= LONGEST and usable(scores)


def seen_softmax_(scores_SHTK: Tensor, sizes_2S: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
    """softmax(scale x scores) over what each token sees, in the place of the scores."""
    own, before = sizes_2S.unbind()
    kernel("seen_softmax", scores_SHTK)(
        scores_SHTK.data_ptr(), own.data_ptr(), before.data_ptr(), *scores_SHTK.shape, window or 0, causal,
        scale,
    )  # fmt: skip
    return scores_SHTK


def seen_softmax_backward_(
    grad_SHTK: Tensor, share_SHTK: Tensor, sizes_2S: Tensor, causal: bool, window: int | None, scale: float
) -> Tensor:
    """The gradient of the scores, in the place of that of the shares."""
    own, before = sizes_2S.unbind()
    kernel("seen_softmax_backward", grad_SHTK)(
        grad_SHTK.data_ptr(), share_SHTK.data_ptr(), own.data_ptr(), before.data_ptr(), *grad_SHTK.shape,
        window or 0, causal, scale,
    )  # fmt: skip
    return grad_SHTK


def naive_seen_softmax(scores_SHTK: Tensor, sizes_2S: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
    """The same in plain torch, not in place."""
    width, whole = scores_SHTK.shape[2:]
    places_T, places_K = torch.arange(width), torch.arange(whole) - (whole - width)
    away_TK = places_T[:, None] - places_K
    seen_STK = (places_K >= -sizes_2S[1, :, None, None]) & (places_K < sizes_2S[0, :, None, None])
    if window is not None:
        seen_STK = seen_STK & (away_TK.abs() < window)
    if causal:
        seen_STK = seen_STK & (away_TK >= 0)
    real_ST1 = places_T[:, None] < sizes_2S[0, :, None, None]
    seen_S1TK = (seen_STK & real_ST1)[:, None]
    shares = (scale * scores_SHTK.float()).masked_fill(~seen_S1TK, float("-inf")).softmax(-1)
    return shares.masked_fill(~seen_S1TK, 0.0).to(scores_SHTK.dtype)
