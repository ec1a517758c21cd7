"""In which form weights are kept to be multiplied: as tensors, before they are packed."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Form: TypeAlias = Literal["bfloat16", "int8", "int4"]
BITS: dict[Form, int] = {"bfloat16": 16, "int8": 8, "int4": 4}
# Numbers along a row of int4 that share a scale, and a multiple of which rows of bytes are filled up to.
GROUP = 64
# Scales that are tried for a group of int4, as shares of the one that reaches its largest number.
TRIED = (1.0, 0.95, 0.9, 0.85, 0.8)


def to_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 [N, K] and a scale for each row [N]."""
    wide_NK = weight_NK.float()
    scale_N = (wide_NK.abs().amax(1) / 127).clamp_(min=1e-12)
    return (wide_NK / scale_N[:, None]).round_().to(torch.int8), scale_N


def to_int4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from 0 to 15, of which 8 stands for none [N, K], and a scale in bf16 for each group [N, K / GROUP].

    A scale's sign lets the group's largest number be the 0 that has no opposite; of a few sizes the one with the least
    squared error is kept.
    """
    groups_NGK = weight_NK.float().unflatten(1, (-1, GROUP))  # type: ignore[no-untyped-call]
    at_NG1 = groups_NGK.abs().argmax(-1, keepdim=True)
    largest_NG1 = groups_NGK.gather(-1, at_NG1)
    best_NG1 = torch.full_like(largest_NG1, torch.inf)
    # A group that holds what is no number, or is too large to be squared, is none: no error of it is less than another.
    kept_NGK, kept_scale_NG1 = torch.zeros_like(groups_NGK), torch.full_like(largest_NG1, torch.nan)
    for share in TRIED:
        scale_NG1 = (largest_NG1 * (-share / 8)).bfloat16().float()
        scale_NG1 = torch.where(scale_NG1.abs() < 1e-12, torch.full_like(scale_NG1, 1e-12), scale_NG1)
        whole_NGK = (groups_NGK / scale_NG1).round_().clamp_(-8, 7)
        error_NG1 = (whole_NGK * scale_NG1 - groups_NGK).square_().sum(-1, keepdim=True)
        better_NG1 = error_NG1 < best_NG1
        best_NG1 = torch.where(better_NG1, error_NG1, best_NG1)
        kept_NGK = torch.where(better_NG1, whole_NGK, kept_NGK)
        kept_scale_NG1 = torch.where(better_NG1, scale_NG1, kept_scale_NG1)
    return (kept_NGK.flatten(1) + 8).to(torch.uint8), kept_scale_NG1.squeeze(-1).bfloat16()


def filled(weight_NK: Tensor, form: Form) -> Tensor:
    """With rows to whole tiles of 16, and for bytes columns to whole groups, of zeros."""
    (n, k), multiple = weight_NK.shape, 2 if form == "bfloat16" else GROUP
    return F.pad(weight_NK, (0, -k % multiple, 0, -n % 16))


def rounded(weight_NK: Tensor, form: Form) -> Tensor:
    """What a weight in this form stands for, in fp32."""
    if form == "bfloat16":
        return weight_NK.bfloat16().float()
    n, k = weight_NK.shape
    whole_NK = filled(weight_NK, form)
    if form == "int8":
        numbers_NK, scale_N = to_int8(whole_NK)
        made_NK = numbers_NK.float() * scale_N[:, None]
    else:
        numbers_NK, scale_NG = to_int4(whole_NK)
        groups_NGK = (numbers_NK.float() - 8).unflatten(1, (-1, GROUP))  # type: ignore[no-untyped-call]
        made_NK = (groups_NGK * scale_NG.float()[..., None]).flatten(1)
    return made_NK[:n, :k]
