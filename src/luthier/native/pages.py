"""Attention of single tokens over keys and values in blocks: the C kernel, and its twin in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.native.layers import kernel, usable


def attend_pages(
    q_NHD: Tensor,
    keys_SKD: Tensor,
    values_SKD: Tensor,
    tables: Tensor,
    first_N: Tensor,
    seen_N: Tensor,
    block: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[N, H, D]: token n sees `seen_N[n]` places (the last `window` of them), place p in slot
    tables[first_N[n] + p // block] * block + p % block of `keys_SKD` and `values_SKD`. What a token gets does not depend on
    the tokens beside it. Where there are no kernels, the same in plain torch."""
    if not usable(q_NHD, keys_SKD, values_SKD):
        return naive_attend_pages(
            q_NHD, keys_SKD, values_SKD, tables, first_N, seen_N, block,
            scale=scale, window=window, softcap=softcap, sinks_H=sinks_H,
        )  # fmt: skip
    q_NHD = q_NHD.contiguous()
    out_NHD = torch.empty_like(q_NHD)
    sinks_H = None if sinks_H is None else sinks_H.float().contiguous()
    kernel("attend_pages", q_NHD)(
        q_NHD.data_ptr(), keys_SKD.data_ptr(), values_SKD.data_ptr(), tables.data_ptr(), first_N.data_ptr(),
        seen_N.data_ptr(), None if sinks_H is None else sinks_H.data_ptr(), out_NHD.data_ptr(), *q_NHD.shape[:2],
        keys_SKD.shape[1], q_NHD.shape[2], block, scale, window or 0, softcap or 0.0,
    )  # fmt: skip
    return out_NHD


def naive_attend_pages(
    q_NHD: Tensor,
    keys_SKD: Tensor,
    values_SKD: Tensor,
    tables: Tensor,
    first_N: Tensor,
    seen_N: Tensor,
    block: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The same, token by token."""
    times = q_NHD.shape[1] // keys_SKD.shape[1]
    outs = []
    for q_HD, first, seen in zip(q_NHD, _plain(first_N), _plain(seen_N)):
        places = torch.arange(max(0, seen - window) if window else 0, seen, device=tables.device)
        slots = tables[first + places // block].long() * block + places % block
        k_HPD, v_HPD = (
            one[slots].float().transpose(0, 1).repeat_interleave(times, 0) for one in (keys_SKD, values_SKD)
        )
        scores_HP = torch.einsum("hd,hpd->hp", q_HD.float() * scale, k_HPD)
        if softcap is not None:
            scores_HP = torch.tanh(scores_HP / softcap) * softcap
        if sinks_H is not None:
            scores_HP = torch.cat([scores_HP, sinks_H.float()[:, None]], 1)
        share_HP = scores_HP.softmax(-1)[:, : len(places)]
        outs.append(torch.einsum("hp,hpd->hd", share_HP, v_HPD))
    return torch.stack(outs).to(q_NHD.dtype) if outs else torch.empty_like(q_NHD)


def _plain(numbers: Tensor) -> Sequence[int]:
    return [int(one) for one in numbers.tolist()]
