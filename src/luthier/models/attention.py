"""Attention of texts laid end to end: each attends to itself alone, in unmodified transformers models, without a mask.

`attend` is registered with transformers under the name "luthier", and stands in for a model's own attention while
`packed_attention` lasts. It needs the keyword `segments`, which most families pass on from the model's forward to their
attention. A family that does not, or that has an attention of its own, is found out by `packs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from luthier.models.segments import Group, Segments
from luthier.native.softmax import can_see, seen_softmax_, seen_softmax_backward_

NAME = "luthier"


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


class Steps(Protocol):
    """What can stand in the place of segments: it attends by itself (`models.pages`)."""

    def attend(self, layer: int | None, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, rules: Rules) -> Tensor: ...


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | Steps,
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
    return attend_flat(q_NHD, k_NKD, v_NKD, segments, rules, getattr(module, "layer_idx", None))[None], None


def attend_flat(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments | Steps, rules: Rules, layer: int | None = None
) -> Tensor:
    """[N, H, D] from flat queries [N, H, D], keys and values [N, KV, D], in the layer of that number."""
    if not isinstance(segments, Segments):
        return segments.attend(layer, q_NHD, k_NKD, v_NKD, rules)
    if rules.softcap is not None or rules.sinks is not None or rules.dropout:
        return _attend_plainly(q_NHD, k_NKD, v_NKD, segments, rules)
    if not segments.short:
        return _attend_long(q_NHD, k_NKD, v_NKD, segments, rules)
    out_NHD: Tensor = ShortAttention.apply(q_NHD, k_NKD, v_NKD, segments, rules)  # type: ignore[no-untyped-call]
    if segments.long_tokens is not None:
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
        for at in range(len(segments.short)):
            share = _shares(flat_q, flat_k, segments, at, heads, kv, rules)
            v = flat_v.index_select(0, segments.key_rows(at, kv)).view(len(share), -1, size)
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
        # Groups that have parents come last, so that what they add meets the parents' own.
        for at, (group, share) in enumerate(zip(segments.short, shares)):
            (take_q, put_q), take_k = segments.rows(at, heads), segments.key_rows(at, kv)
            go = flat_go.index_select(0, take_q)
            if not group.even and not can_see(share):
                # Padding repeats a token, and must not count twice.
                go[put_q == tokens * heads] = 0
            go = go.view(share.shape[0], share.shape[1], size)
            q = flat_q.index_select(0, take_q).view_as(go)
            k, v = (one.index_select(0, take_k).view(len(share), -1, size) for one in (flat_k, flat_v))
            grad_share = torch.bmm(go, v.transpose(1, 2))
            if can_see(share):
                shape = (len(group.lengths), heads, group.width, -1)
                grads_SHTK, share_SHTK = grad_share.view(shape), share.view(shape)
                seen_softmax_backward_(grads_SHTK, share_SHTK, group.sizes, rules.causal, rules.window, rules.scale)
                grad_score = grad_share
            else:
                grad_score = torch._softmax_backward_data(grad_share, share, -1, share.dtype).mul_(rules.scale)
            made[0].index_copy_(0, put_q, torch.bmm(grad_score, k).view(-1, size))
            _put_keys(made[1], torch.bmm(grad_score.transpose(1, 2), q), segments, at, kv)
            _put_keys(made[2], torch.bmm(share.transpose(1, 2), go), segments, at, kv)
        gq, gk, gv = (one[:-1].view(tokens, -1, size) for one in made)
        return gq, gk, gv, None, None


def _shares(flat_q: Tensor, flat_k: Tensor, segments: Segments, at: int, heads: int, kv: int, rules: Rules) -> Tensor:
    """Softmax of the scores of group `at`: [S * KV, (H / KV) * T, B + T]."""
    group, size = segments.short[at], flat_q.shape[-1]
    q = flat_q.index_select(0, segments.rows(at, heads)[0]).view(len(group.lengths) * kv, -1, size)
    k = flat_k.index_select(0, segments.key_rows(at, kv)).view(len(q), -1, size)
    scores = torch.bmm(q, k.transpose(1, 2))
    scores_SHTK = scores.view(len(group.lengths), heads, group.width, -1)
    if can_see(scores):
        seen_softmax_(scores_SHTK, group.sizes, rules.causal, rules.window, rules.scale)
        return scores
    _hide(scores_SHTK.mul_(rules.scale), segments, group, rules)
    return scores.softmax(-1)


def _hide(scores_SHTK: Tensor, segments: Segments, group: Group, rules: Rules) -> None:
    """Take from the scores, in place, what a token must not see."""
    lowest = torch.finfo(scores_SHTK.dtype).min
    mask_TK = segments.mask(group.width, group.before, rules.causal, rules.window, scores_SHTK.dtype)
    if mask_TK is not None:
        scores_SHTK.add_(mask_TK)
    if group.seen is not None:
        scores_SHTK[..., : group.before].masked_fill_(~group.seen[:, None, None], lowest)
    if not rules.causal and not group.even:
        scores_SHTK[..., group.before :].masked_fill_(~group.real[:, None, None], lowest)


def _put_keys(made: Tensor, grads: Tensor, segments: Segments, at: int, kv: int) -> None:
    """Put the gradient [S * KV, B + T, D] of the keys or values of group `at` where it belongs in `made` [N * KV + 1, D]:
    that of a segment's own is all it has, that of a parent's comes on top, summed over the segments in fp32."""
    group, size = segments.short[at], grads.shape[-1]
    put = segments.rows(at, kv)[1]
    if not group.before:
        made.index_copy_(0, put, grads.view(-1, size))
        return
    made.index_copy_(0, put, grads[:, group.before :].reshape(-1, size))
    which_S, take, places = segments.parent_rows(at, kv)
    wide = torch.promote_types(grads.dtype, torch.float32)
    shared = grads[:, : group.before].to(wide).reshape(len(which_S), -1)
    total = shared.new_zeros(len(set(group.parents)), shared.shape[1]).index_add_(0, which_S, shared)
    whole = made.index_select(0, places).to(wide) + total.view(-1, size).index_select(0, take)
    made.index_copy_(0, places, whole.to(made.dtype))


def _attend_long(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, rules: Rules) -> Tensor:
    """[M, H, D] of the long segments, end to end: the fused kernel for each."""
    pieces = [torch.split(one, list(segments.lengths)) for one in (q_NHD, k_NKD, v_NKD)]
    parts = []
    for at in segments.long:
        q_THD, k_PKD, v_PKD = pieces[0][at], _seen(pieces[1], segments, at), _seen(pieces[2], segments, at)
        width, whole = len(q_THD), len(k_PKD)
        # The kernel's own causal mask begins at the first key, which is not where a continuation begins.
        masked = (rules.causal and whole > width) or (rules.window is not None and whole > rules.window)
        mask_TP = segments.mask(width, whole - width, rules.causal, rules.window, q_NHD.dtype) if masked else None
        q_1HTD, k_1KPD, v_1KPD = (one.transpose(0, 1)[None] for one in (q_THD, k_PKD, v_PKD))
        out_HTD = F.scaled_dot_product_attention(
            q_1HTD,
            k_1KPD,
            v_1KPD,
            attn_mask=mask_TP,
            is_causal=rules.causal and not masked,
            scale=rules.scale,
            enable_gqa=q_NHD.shape[1] != k_NKD.shape[1],
        )[0]
        parts.append(out_HTD.transpose(0, 1))
    return torch.cat(parts)


def _seen(pieces: Sequence[Tensor], segments: Segments, at: int) -> Tensor:
    """Of keys or values by segment, those that segment `at` sees: its own, after its parent's."""
    up = segments.parents[at]
    return torch.cat([pieces[up], pieces[at]]) if up >= 0 else pieces[at]


def _attend_plainly(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, rules: Rules) -> Tensor:
    """[N, H, D], segment by segment in plain operations: what soft-caps, sinks and dropout ask for, and the reference."""
    times = q_NHD.shape[1] // k_NKD.shape[1]
    pieces = [torch.split(one, list(segments.lengths)) for one in (q_NHD, k_NKD, v_NKD)]
    parts = []
    for at, q_THD in enumerate(pieces[0]):
        k_HPD, v_HPD = (_seen(one, segments, at).transpose(0, 1).repeat_interleave(times, 0) for one in pieces[1:])
        width, whole = len(q_THD), k_HPD.shape[1]
        scores_HTP = (q_THD.transpose(0, 1) * rules.scale) @ k_HPD.transpose(1, 2)
        if rules.softcap is not None:
            scores_HTP = torch.tanh(scores_HTP / rules.softcap) * rules.softcap
        mask_TP = segments.mask(width, whole - width, rules.causal, rules.window, scores_HTP.dtype)
        if mask_TP is not None:
            scores_HTP = scores_HTP + mask_TP
        if rules.sinks is not None:
            sink_HT1 = rules.sinks.to(scores_HTP.dtype)[:, None, None].expand(-1, width, 1)
            scores_HTP = torch.cat([scores_HTP, sink_HT1], -1)
        share_HTP = scores_HTP.softmax(-1)[..., :whole]
        parts.append((F.dropout(share_HTP, rules.dropout) @ v_HPD).transpose(0, 1))
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
