"""A decoder in plain torch: the reference for `native.cached`, one text at a time and with nothing kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.native.forms import Form, rounded
from luthier.native.shape import Activation, Decoder, Linear, Norm

# Places whose shares are rounded with one scale.
BLOCK = 32


@torch.no_grad()
def read_plainly(
    decoder: Decoder, ids_T: Tensor, form: Form | None = None, head_form: Form | None = None, kept: Form | None = None
) -> Tensor:
    """[T, V]: the logits after each token of a text, in fp32, with weights rounded as `form` has them; with `kept` int8 keys,
    values, queries and shares as bytes."""
    count, (heads, kv, size) = len(ids_T), (decoder.heads, decoder.kv, decoder.size)
    embedding_VE = decoder.embedding_VE if form is None else decoder.embedding_VE.bfloat16()
    x_TE = embedding_VE[ids_T].float() * decoder.embedding_scale
    if decoder.places_PE is not None:
        x_TE = x_TE + decoder.places_PE[:count].float()
    places_T = torch.arange(count)
    for block in decoder.blocks:
        made_TN = _product(block.qkv, _norm(block.before_attention, x_TE), form)
        q_THD, k_TKD, v_TKD = made_TN.view(count, -1, size).split([heads, kv, kv], 1)  # type: ignore[no-untyped-call]
        q_THD, k_TKD = _norm(block.query, q_THD), _norm(block.key, k_TKD)
        if block.turns is not None:
            cosine, sine = (one[:, None] for one in block.turns.tables(count))
            q_THD, k_TKD = (_turn(one, cosine, sine) for one in (q_THD, k_TKD))
        q_THD = q_THD * decoder.scale
        scale_TK = torch.ones(count, kv)
        if kept == "int8":
            (q_THD, q_scale_TH), (k_TKD, k_scale_TK) = as_bytes(q_THD), as_bytes(k_TKD)
            q_THD, k_TKD = q_THD * q_scale_TH[..., None], k_TKD * k_scale_TK[..., None]
            v_TKD, scale_TK = as_bytes(v_TKD)
        k_TKD, v_TKD, scale_TH = (one.repeat_interleave(heads // kv, 1) for one in (k_TKD, v_TKD, scale_TK))
        scores_HTS = torch.einsum("thd,shd->hts", q_THD, k_TKD)
        if decoder.softcap is not None:
            scores_HTS = decoder.softcap * torch.tanh(scores_HTS / decoder.softcap)
        apart_TS = places_T[:, None] - places_T[None]
        hidden_TS = (apart_TS < 0) | (apart_TS >= (block.window or count))
        share_HTS = scores_HTS.masked_fill(hidden_TS, -torch.inf).softmax(-1) * scale_TH.T[:, None]
        if kept == "int8":
            share_HTS = shares_as_bytes(share_HTS)
        mixed_TM = torch.einsum("hts,shd->thd", share_HTS, v_TKD).flatten(1)
        branch_TE = _norm(block.after_attention, _product(block.out, mixed_TM, form)) * decoder.residual
        into_TE = _norm(block.before_mlp, x_TE if decoder.parallel else x_TE + branch_TE)
        up_TF = _product(block.up, into_TE, form)
        if decoder.gated:
            gate_TF, up_TF = up_TF.chunk(2, -1)
            low_TF = activate(decoder.activation, gate_TF) * up_TF
        else:
            low_TF = activate(decoder.activation, up_TF)
        down_TE = _norm(block.after_mlp, _product(block.down, low_TF, form)) * decoder.residual
        x_TE = x_TE + branch_TE + down_TE
    logits_TV = _product(decoder.head, _norm(decoder.last, x_TE), head_form or form) * decoder.head_scale
    if decoder.head_softcap is not None:
        logits_TV = decoder.head_softcap * torch.tanh(logits_TV / decoder.head_softcap)
    return logits_TV


def as_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 [..., D], and a scale for each row of them [...]."""
    scale = (x.abs().amax(-1) / 127).clamp_(min=1e-12)
    return (x / scale[..., None]).round_(), scale


def shares_as_bytes(share_HTS: Tensor) -> Tensor:
    """Rounded so that the largest of each block of places is 255 of its scale."""
    count = share_HTS.shape[-1]
    padded_HTS = F.pad(share_HTS, (0, -count % BLOCK))
    blocks_HTBS: Tensor = padded_HTS.unflatten(-1, (-1, BLOCK))  # type: ignore[no-untyped-call]
    scale_HTB1 = (blocks_HTBS.amax(-1, keepdim=True) / 255).clamp_(min=1e-30)
    return ((blocks_HTBS / scale_HTB1).round_() * scale_HTB1).flatten(-2)[..., :count]


def activate(kind: Activation, x: Tensor) -> Tensor:
    """The activation of that name."""
    if kind == "silu":
        return F.silu(x)
    if kind in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    return F.relu(x) if kind == "relu" else F.relu(x).square()


def _norm(norm: Norm | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    width, bias_E = x.shape[-1:], None if norm.bias_E is None else norm.bias_E.float()
    if norm.kind == "rms":
        return F.rms_norm(x, width, norm.weight_E.float(), norm.eps)
    return F.layer_norm(x, width, norm.weight_E.float(), bias_E, norm.eps)


def _product(linear: Linear, x: Tensor, form: Form | None) -> Tensor:
    weight_NK = linear.weight().float() if form is None else rounded(linear.weight(), form)
    y = F.linear(x, weight_NK, None if linear.bias_N is None else linear.bias_N.float())
    for low in linear.lows():
        y[:, low.start : low.stop] += x @ low.a_RK.float().T @ low.b_NR.float().T
    return y


def _turn(x_THD: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = cosine.shape[-1]
    first, second, rest = x_THD[..., :half], x_THD[..., half : 2 * half], x_THD[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)
