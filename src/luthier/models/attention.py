"""Attention of texts laid end to end: each attends to itself alone, in unmodified transformers models, without a mask.

`attend` is registered with transformers under the name "luthier", and stands in for a model's own attention while
`packed_attention` lasts. It needs the keyword `segments`, which most families pass on from the model's forward to their
attention. A family that does not, or that has an attention of its own, is found out by `packs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "luthier"
# Up to this length three matrix operations beat the fused kernel on a CPU (2 x Zen 5, bf16, forward and backward of
# 2,048 tokens: segments of 128 take 15 ms against 41, of 512 64 against 61).
SHORT = 320
# Segments are computed side by side while no more than this share of their scores is padding, and while the scores of a
# group stay small.
WASTE, SCORES = 0.25, 2**22


@dataclass(frozen=True, slots=True)
class Rules:
    """How the tokens of a segment see one another, and how their scores are made."""

    causal: bool
    scale: float
    window: int | None = None
    """A token sees itself and the window - 1 before it, and in an encoder as many after it."""
    softcap: float | None = None
    sinks: Tensor | None = None
    """[H]: a learned score that takes its share of the softmax and gives nothing."""
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """S segments of like length side by side, T places each; places beyond a segment's end repeat its last token."""

    lengths: tuple[int, ...]
    width: int
    tokens: Tensor
    """[S, T]: the flat place of each token."""
    real: Tensor
    """[S, T]: whether a place holds a token of its own."""

    @property
    def even(self) -> bool:
        return min(self.lengths) == self.width


class Segments:
    """The segments of a flat batch, and the plan to compute them: made once a step, on the host.

    `short` are groups computed side by side, `long` the (start, end) of segments computed alone.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.lengths, self.device = tuple(lengths), torch.device(device)
        starts = [0, *accumulate(lengths)]
        order = sorted(range(len(lengths)), key=lambda at: lengths[at])
        self.long = [(starts[at], starts[at + 1]) for at in range(len(lengths)) if lengths[at] > SHORT]
        groups: list[list[int]] = []
        used = 0
        for at in order:
            size = lengths[at]
            if size > SHORT:
                break
            area = (len(groups[-1]) + 1) * size**2 if groups else 0
            if groups and used + size**2 >= (1 - WASTE) * area and area <= SCORES:
                groups[-1].append(at)
                used += size**2
            else:
                groups.append([at])
                used = size**2
        self.short = [self._group([starts[at] for at in one], [lengths[at] for at in one]) for one in groups]
        inside = [torch.arange(start, end) for start, end in self.long]
        self.long_tokens = torch.cat(inside).to(self.device) if inside else None
        self._rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _group(self, starts: Sequence[int], lengths: Sequence[int]) -> Group:
        width = max(lengths)
        places_T = torch.arange(width)
        size_S1, start_S1 = torch.tensor(lengths)[:, None], torch.tensor(starts)[:, None]
        tokens_ST = start_S1 + torch.minimum(places_T, size_S1 - 1)
        return Group(tuple(lengths), width, tokens_ST.to(self.device), (places_T < size_S1).to(self.device))

    def rows(self, at: int, heads: int) -> tuple[Tensor, Tensor]:
        """Where the heads of group `at` lie in a flat [N * heads] list of vectors, in the order [S, heads, T]: (places to
        take from, places to put to). What is put for padding goes to the place N * heads."""
        key = (at, heads)
        if key not in self._rows:
            group = self.short[at]
            head_H11 = torch.arange(heads, device=self.device)[:, None]
            take_SHT = group.tokens[:, None] * heads + head_H11
            put_SHT = torch.where(group.real[:, None], take_SHT, sum(self.lengths) * heads)
            self._rows[key] = (take_SHT.flatten(), put_SHT.flatten())
        return self._rows[key]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, H, N, D], key and value [1, KV, N, D] to [1, N, H, D]."""
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rules = Rules(causal, scale, sliding_window, softcap, s_aux, dropout)
    q_NHD, k_NKD, v_NKD = (one[0].transpose(0, 1) for one in (query, key, value))
    return attend_flat(q_NHD, k_NKD, v_NKD, segments, rules)[None], None


def attend_flat(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, rules: Rules) -> Tensor:
    """[N, H, D] from flat queries [N, H, D], keys and values [N, KV, D]."""
    if rules.softcap is not None or rules.sinks is not None or rules.dropout:
        return _attend_plainly(q_NHD, k_NKD, v_NKD, segments, rules)
    if not segments.short:
        return _attend_long(q_NHD, k_NKD, v_NKD, segments, rules)
    out_NHD = ShortAttention.apply(q_NHD, k_NKD, v_NKD, segments, rules)
    if segments.long:
        return out_NHD.index_copy(0, segments.long_tokens, _attend_long(q_NHD, k_NKD, v_NKD, segments, rules))
    return out_NHD


class ShortAttention(torch.autograd.Function):
    """Attention of groups of short segments by three matrix operations, with a backward pass that keeps what it needs.

    Gathers the vectors of a group once, and writes results where they belong, so that nothing is padded, concatenated
    or masked per token. Scores are in the precision of the inputs with an fp32 softmax, as in the fused kernels.
    """

    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, rules: Rules) -> Tensor:
        (tokens, heads, size), kv = q_NHD.shape, k_NKD.shape[1]
        flat_q, flat_k, flat_v = (one.reshape(-1, size) for one in (q_NHD, k_NKD, v_NKD))
        out = flat_q.new_empty(tokens * heads + 1, size)
        shares = []
        for at, group in enumerate(segments.short):
            share = _shares(flat_q, flat_k, segments, at, heads, kv, rules)
            v = flat_v.index_select(0, segments.rows(at, kv)[0]).view(-1, group.width, size)
            out.index_copy_(0, segments.rows(at, heads)[1], torch.bmm(share, v).view(-1, size))
            shares.append(share)
        ctx.save_for_backward(flat_q, flat_k, flat_v, *shares)
        ctx.segments, ctx.rules, ctx.shape = segments, rules, (tokens, heads, kv, size)
        return out[:-1].view(tokens, heads, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat_q, flat_k, flat_v, *shares = ctx.saved_tensors
        tokens, heads, kv, size = ctx.shape
        segments, rules = ctx.segments, ctx.rules
        flat_go = grads[0].reshape(-1, size)
        # The long segments' tokens have their gradient from elsewhere: here it is zero.
        new = flat_q.new_zeros if segments.long else flat_q.new_empty
        made = [new(tokens * one + 1, size) for one in (heads, kv, kv)]
        for at, (group, share) in enumerate(zip(segments.short, shares)):
            (take_q, put_q), (take_k, put_k) = segments.rows(at, heads), segments.rows(at, kv)
            go = flat_go.index_select(0, take_q)
            if not group.even:
                # Padding repeats a token, and must not count twice.
                go[put_q == tokens * heads] = 0
            go = go.view(share.shape[0], share.shape[1], size)
            q = flat_q.index_select(0, take_q).view_as(go)
            k, v = (one.index_select(0, take_k).view(-1, group.width, size) for one in (flat_k, flat_v))
            grad_share = torch.bmm(go, v.transpose(1, 2))
            grad_score = torch._softmax_backward_data(grad_share, share, -1, share.dtype).mul_(rules.scale)
            made[0].index_copy_(0, put_q, torch.bmm(grad_score, k).view(-1, size))
            made[1].index_copy_(0, put_k, torch.bmm(grad_score.transpose(1, 2), q).view(-1, size))
            made[2].index_copy_(0, put_k, torch.bmm(share.transpose(1, 2), go).view(-1, size))
        gq, gk, gv = (one[:-1].view(tokens, -1, size) for one in made)
        return gq, gk, gv, None, None


def _shares(flat_q: Tensor, flat_k: Tensor, segments: Segments, at: int, heads: int, kv: int, rules: Rules) -> Tensor:
    """Softmax of the scores of group `at`: [S * KV, (H / KV) * T, T]."""
    group, size = segments.short[at], flat_q.shape[-1]
    width = group.width
    q = flat_q.index_select(0, segments.rows(at, heads)[0]).view(len(group.lengths) * kv, -1, size)
    k = flat_k.index_select(0, segments.rows(at, kv)[0]).view(-1, width, size)
    scores = torch.bmm(q.mul_(rules.scale), k.transpose(1, 2))
    _hide(scores.view(len(group.lengths), heads, width, width), group, rules)
    return scores.softmax(-1)


def _hide(scores_SHTT: Tensor, group: Group, rules: Rules) -> None:
    """Take from the scores, in place, what a token must not see."""
    mask_TT = _mask(group.width, rules.causal, rules.window, scores_SHTT.dtype, scores_SHTT.device)
    if mask_TT is not None:
        scores_SHTT.add_(mask_TT)
    if not rules.causal and not group.even:
        scores_SHTT.masked_fill_(~group.real[:, None, None], torch.finfo(scores_SHTT.dtype).min)


@lru_cache(maxsize=256)
def _mask(width: int, causal: bool, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[T, T] to add to scores: 0 where the row's token sees the column's; None where it sees all."""
    if not causal and (window is None or width <= window):
        return None
    places = torch.arange(width, device=device)
    away_TT = places[:, None] - places
    seen_TT = away_TT.abs() < (window or width)
    if causal:
        seen_TT &= away_TT >= 0
    return torch.zeros(width, width, dtype=dtype, device=device).masked_fill_(~seen_TT, torch.finfo(dtype).min)


def _attend_long(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, rules: Rules) -> Tensor:
    """[M, H, D] of the long segments, end to end: the fused kernel for each."""
    parts = []
    for start, end in segments.long:
        windowed = rules.window is not None and end - start > rules.window
        mask_TT = _mask(end - start, rules.causal, rules.window, q_NHD.dtype, q_NHD.device) if windowed else None
        out_HTD = F.scaled_dot_product_attention(
            *(one[start:end].transpose(0, 1)[None] for one in (q_NHD, k_NKD, v_NKD)),
            attn_mask=mask_TT,
            is_causal=rules.causal and not windowed,
            scale=rules.scale,
            enable_gqa=q_NHD.shape[1] != k_NKD.shape[1],
        )[0]
        parts.append(out_HTD.transpose(0, 1))
    return torch.cat(parts)


def _attend_plainly(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, rules: Rules) -> Tensor:
    """[N, H, D], segment by segment in plain operations: what soft-caps, sinks and dropout ask for, and the reference."""
    times = q_NHD.shape[1] // k_NKD.shape[1]
    parts = []
    for q_THD, k_TKD, v_TKD in zip(*(one.split(segments.lengths) for one in (q_NHD, k_NKD, v_NKD))):
        k_HTD, v_HTD = (one.transpose(0, 1).repeat_interleave(times, 0) for one in (k_TKD, v_TKD))
        scores_HTT = (q_THD.transpose(0, 1) * rules.scale) @ k_HTD.transpose(1, 2)
        if rules.softcap is not None:
            scores_HTT = torch.tanh(scores_HTT / rules.softcap) * rules.softcap
        mask_TT = _mask(len(q_THD), rules.causal, rules.window, scores_HTT.dtype, scores_HTT.device)
        if mask_TT is not None:
            scores_HTT = scores_HTT + mask_TT
        if rules.sinks is not None:
            sink_HT1 = rules.sinks.to(scores_HTT.dtype)[:, None, None].expand(-1, len(q_THD), 1)
            scores_HTT = torch.cat([scores_HTT, sink_HT1], -1)
        share_HTT = scores_HTT.softmax(-1)[..., : len(q_THD)]
        parts.append((F.dropout(share_HTT, rules.dropout) @ v_HTD).transpose(0, 1))
    return torch.cat(parts)


@contextmanager
def packed_attention(network: Any) -> Iterator[None]:
    """Inside, the model attends by `attend`, and makes no mask."""
    config = network.config
    own = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own


AttentionInterface.register(NAME, attend)
