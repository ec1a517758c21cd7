"""What the tokens of answers should gain: by the rewards of a group, by the pull to the start, and while the model moves on."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T", np.ndarray, Tensor)
# Beside the standard deviation of a group, so that nearly equal rewards do not become large advantages.
SMALL = 1e-4


def advantages(rewards: Sequence[float], standardise: bool = True) -> list[float]:
    """Each reward minus the mean of its group, over its standard deviation (n - 1); exactly 0 where all are equal."""
    if max(rewards) - min(rewards) < 1e-9:
        return [0.0] * len(rewards)
    middle = fmean(rewards)
    scale = stdev(rewards) + SMALL if standardise else 1.0
    return [(reward - middle) / scale for reward in rewards]


def pull(now_T: T, start_T: T) -> tuple[T, T]:
    """(what the log-likelihood of each token should gain to come nearer the start, its KL) from log-likelihoods.

    The estimate r - log r - 1 with r = p_start / p_now (k3 in Schulman 2020, "Approximating KL divergence") has the
    derivative 1 - r after log p_now; the gain is minus that.
    """
    ratio_T = np.exp(start_T - now_T) if isinstance(now_T, np.ndarray) else (start_T - now_T).exp()
    return ratio_T - 1, ratio_T - (start_T - now_T) - 1


class Clipped(NamedTuple):
    """Of each token [M]: its loss, what its log-likelihood should gain (minus the derivative), and whether it is clipped."""

    loss_M: Tensor
    gain_M: Tensor
    clipped_M: Tensor


def clipped(now_M: Tensor, written_M: Tensor, advantage_M: Tensor, low: float, high: float) -> Clipped:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = p_now / p_written, from log-likelihoods (PPO: Schulman et al. 2017,
    arXiv:1707.06347; two bounds: DAPO, Yu et al. 2025, arXiv:2503.14476).

    The derivative after log p_now is -r A; 0 where the bound makes the loss a constant: beyond 1 + high for what is better
    than its group, below 1 - low for what is worse.
    """
    ratio_M = (now_M - written_M).exp()
    clipped_M = ((advantage_M > 0) & (ratio_M > 1 + high)) | ((advantage_M < 0) & (ratio_M < 1 - low))
    bounded_M = ratio_M.clamp(1 - low, 1 + high)
    loss_M = -torch.min(ratio_M * advantage_M, bounded_M * advantage_M)
    return Clipped(loss_M, torch.where(clipped_M, 0.0, ratio_M * advantage_M), clipped_M)
