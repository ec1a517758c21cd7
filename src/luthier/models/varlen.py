"""Attention over keys and values in pages on a CUDA device: torch's `varlen_attn` for what it covers, plain torch for the rest.

What FlashAttention 2 asks for, as torch 2.13 checks it: pages of a multiple of 256 tokens, numbers of 16 bits, heads of at most
256 numbers and a multiple of 8, a device of capability 8.0 or later; tables, starts and lengths in int32, and starts of the keys
too although a table says where they lie. The last query of a text is at its last key. Whether it does what is expected of it here
is tried once a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.models.attention import Rules

# Tokens of a page, and what else FlashAttention 2 takes.
PAGE, WIDEST, MULTIPLE = 256, 256, 8
DEVICES, DTYPES = ("cuda",), (torch.bfloat16, torch.float16)
OLDEST = 8
# What rounding may change where it is tried.
TOLERANCE = 3e-2


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of a step, as they are attended to: made once, for all layers.

    `tables_SW` are their pages, filled up with the first of each; `starts` where the new tokens of each begin, and `keys` where
    those of keys would if these lay end to end [S + 1]; `seen_S` how many tokens there are of each with the new ones. All int32
    on the device. `most` new tokens are there of one text, and `longest` tokens in all; the lists are the same for the host,
    None where only the device knows them.
    """

    tables_SW: Tensor
    starts: Tensor
    keys: Tensor
    seen_S: Tensor
    most: int
    longest: int
    lengths: Sequence[int] | None = None
    seen: Sequence[int] | None = None


def texts_of(
    tables: Sequence[Sequence[int]], before: Sequence[int], lengths: Sequence[int], device: torch.device
) -> Texts:
    """Texts of which `before` tokens lie in their pages, and `lengths` new ones come."""
    wide = max(map(len, tables))
    seen = [one + more for one, more in zip(before, lengths)]
    rows = [block for table in tables for block in (*table, *list(table[:1]) * (wide - len(table)))]
    numbers = [*rows, *accumulate(lengths, initial=0), *accumulate(seen, initial=0), *seen]
    # One copy to the device, not four.
    there, count = torch.tensor(numbers, dtype=torch.int32).to(device), len(tables)
    tables_N, starts, keys, seen_S = torch.split(there, [len(rows), count + 1, count + 1, count])
    return Texts(tables_N.view(count, wide), starts, keys, seen_S, max(lengths), max(seen), lengths, seen)


def attend_varlen(q_NHD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, texts: Texts, rules: Rules) -> Tensor:
    """[N, H, D]: each new token sees its text up to itself, by `varlen_attn`. It splits no text, so that what a token gets does
    not depend on the texts beside it."""
    from torch.nn.attention.varlen import varlen_attn

    keys, values = (one.view(-1, PAGE, *one.shape[1:]) for one in (keys_SKD, values_SKD))
    # A single token is the last of its text and needs no mask; without one, heads that share keys are read together.
    right = -1 if texts.most == 1 and rules.window is None else 0
    return varlen_attn(  # type: ignore[return-value]
        q_NHD, keys, values, texts.starts, texts.keys, texts.most, texts.longest, scale=rules.scale,
        window_size=(-1 if rules.window is None else rules.window - 1, right),
        enable_gqa=q_NHD.shape[1] != keys.shape[2], seqused_k=texts.seen_S, block_table=texts.tables_SW, num_splits=1,
    )  # fmt: skip


def attend_by_text(
    q_NHD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, texts: Texts, rules: Rules, block: int
) -> Tensor:
    """The same in plain torch, one text after the other, with soft-caps and sinks; `block` tokens are in a page."""
    assert texts.lengths is not None and texts.seen is not None
    parts, inside_P = [], torch.arange(block, device=q_NHD.device)
    texts_THD = torch.split(q_NHD, list(texts.lengths))
    for q_THD, table_W, seen in zip(texts_THD, texts.tables_SW.long(), texts.seen):
        slots_P = (table_W[: -(-seen // block), None] * block + inside_P).flatten()[:seen]
        k_KPD, v_KPD = (one[slots_P].transpose(0, 1) for one in (keys_SKD, values_SKD))
        new_T = torch.arange(seen - len(q_THD), seen, device=q_NHD.device)[:, None]
        place_P = torch.arange(seen, device=q_NHD.device)
        hidden_TP = place_P > new_T
        if rules.window is not None:
            hidden_TP |= place_P <= new_T - rules.window
        parts.append(_attend_text(q_THD.transpose(0, 1), k_KPD, v_KPD, hidden_TP, rules).transpose(0, 1))
    return torch.cat(parts)


def _attend_text(q_HTD: Tensor, k_KPD: Tensor, v_KPD: Tensor, hidden_TP: Tensor, rules: Rules) -> Tensor:
    if rules.softcap is None and rules.sinks is None:
        return F.scaled_dot_product_attention(
            q_HTD[None], k_KPD[None], v_KPD[None], attn_mask=~hidden_TP, scale=rules.scale,
            enable_gqa=len(q_HTD) != len(k_KPD),
        )[0]  # fmt: skip
    times = len(q_HTD) // len(k_KPD)
    k_HPD, v_HPD = (one.float().repeat_interleave(times, 0) for one in (k_KPD, v_KPD))
    scores_HTP = (q_HTD.float() * rules.scale) @ k_HPD.transpose(1, 2)
    if rules.softcap is not None:
        scores_HTP = torch.tanh(scores_HTP / rules.softcap) * rules.softcap
    scores_HTP = scores_HTP.masked_fill(hidden_TP, -torch.inf)
    if rules.sinks is not None:
        sinks_HT1 = rules.sinks.float()[:, None, None].expand(-1, scores_HTP.shape[1], 1)
        scores_HTP = torch.cat([scores_HTP, sinks_HT1], -1)
    share_HTP = scores_HTP.softmax(-1)[..., : k_HPD.shape[1]]
    return (share_HTP @ v_HPD).to(q_HTD.dtype)


def by_text(device: torch.device) -> bool:
    """Whether steps on this device are attended text by text: elsewhere by the C kernel or its twin, token by token."""
    return device.type in DEVICES


def why_plainly(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, rules: Rules) -> str | None:
    """Why `varlen_attn` does not attend so; None where it does."""
    if rules.softcap is not None:
        return "soft-caps"
    if rules.sinks is not None:
        return "attention sinks"
    if q_NHD.dtype not in DTYPES:
        return f"numbers in {str(q_NHD.dtype).removeprefix('torch.')}"
    width = q_NHD.shape[2]
    if width % MULTIPLE or width > WIDEST or v_NKD.shape[2] != width:
        return f"heads of {width} numbers" if v_NKD.shape[2] == width else "keys and values of different widths"
    return why_not(q_NHD.device, q_NHD.dtype)


@cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `varlen_attn` is not for this device; None where it is. Tried once against plain torch: several texts in pages, one new
    token of each or some, with a window and without."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < OLDEST:
        return "devices older than Ampere"
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(6 * PAGE, 2, 64, generator=draw).to(device, dtype) for _ in range(2))
    tables, seen = [[3, 1], [5], [0, 2]], [PAGE + 44, 5, 2 * PAGE]
    for lengths in ([40, 3, 1], [1, 1, 1]):
        texts = texts_of(tables, [one - more for one, more in zip(seen, lengths)], lengths, device)
        q_NHD = torch.randn(sum(lengths), 4, 64, generator=draw).to(device, dtype)
        for window in (None, 20):
            rules = Rules(True, 0.125, window)
            try:
                found = attend_varlen(q_NHD, keys, values, texts, rules)
            except (RuntimeError, TypeError, ValueError, ImportError, AttributeError) as err:
                said = str(err).splitlines()[0][:120] if str(err) else type(err).__name__
                return f"this device, where it fails ({said})"
            right = attend_by_text(q_NHD, keys, values, texts, rules, PAGE)
            if not float((found.float() - right.float()).abs().max()) <= TOLERANCE:
                return "this device, where it gives other numbers than plain torch"
    return None
