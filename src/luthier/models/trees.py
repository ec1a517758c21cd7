"""Texts that begin alike and fork: what all begin with is read once and kept, and of each text the forks are read side by side.

A text is a tree of tokens, each of which follows another one of the text, or the end of the `Trunk`, and sees what leads
to it. The attention of `models.attention` takes `Trees` where it takes the segments of a batch, so every family that reads
texts laid end to end can be read so, unmodified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from luthier.models.attention import Rules, packed_attention
from luthier.models.spec import LoadedModel

# Tokens of a trunk that are read at once.
PIECE = 512
# Scores that are held at once.
SCORES = 2**24


@dataclass(frozen=True, slots=True)
class Tree:
    """Tokens of one text. `ups` gives for each the place of the one that it follows, which comes before it, or -1 for the
    end of the trunk."""

    ids: tuple[int, ...]
    ups: tuple[int, ...]


@dataclass(slots=True)
class Trunk:
    """What all texts begin with, and its keys and values [KV, B, D] in every layer."""

    ids: tuple[int, ...] = ()
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.ids = self.ids[:length]
        self.layers = {at: (k[:, :length], v[:, :length]) for at, (k, v) in self.layers.items()} if length else {}


class Trees:
    """Texts after a trunk, laid end to end: which tokens each of them sees, and at which places they stand.

    `keeps` adds the one text that there is to the trunk.
    """

    def __init__(self, trees: Sequence[Tree], trunk: Trunk, device: torch.device, *, keeps: bool = False):
        lengths = [len(tree.ids) for tree in trees]
        self.count, self.width, self.before = len(trees), max(lengths), len(trunk.ids)
        self.trunk, self.keeps, self.device = trunk, keeps, device
        # What pads a text sees itself alone, so that no row of scores is empty.
        seen_STT = np.zeros((self.count, self.width, self.width), dtype=bool)
        seen_STT[:, np.arange(self.width), np.arange(self.width)] = True
        for seen_TT, tree in zip(seen_STT, trees):
            for at, up in enumerate(tree.ups):
                if up >= 0:
                    seen_TT[at] |= seen_TT[up]
        deep_ST = seen_STT.sum(2) - 1
        self._seen_STT, self._deep_ST = torch.from_numpy(seen_STT), torch.from_numpy(deep_ST)
        real_ST = torch.arange(self.width) < torch.tensor(lengths)[:, None]
        self.places_N = (self._deep_ST[real_ST] + self.before).to(device)
        starts = np.cumsum([0, *lengths[:-1]])
        flat_ST = torch.from_numpy(starts)[:, None] + torch.arange(self.width).clamp(
            max=torch.tensor(lengths)[:, None] - 1
        )
        self._take = flat_ST.flatten().to(device)
        self._put = real_ST.flatten().nonzero().squeeze(1).to(device)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def attend(self, layer: int | None, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, rules: Rules) -> Tensor:
        """[N, H, D]: each token sees the trunk, and of its text what leads to it and itself."""
        if not rules.causal or layer is None:
            raise ValueError("only a causal model whose layers have numbers reads on from a trunk")
        heads, size = q_NHD.shape[1:]
        kv = k_NKD.shape[1]
        q = self._side_by_side(q_NHD).view(self.count, self.width, kv, heads // kv, size).permute(2, 0, 3, 1, 4)
        k, v = (self._side_by_side(one).permute(2, 0, 1, 3).contiguous() for one in (k_NKD, v_NKD))
        before = self.trunk.layers.get(layer)
        mask_STK = self._mask(rules.window, q.dtype)
        # So many places of each text that their scores are few enough.
        step = max(1, SCORES // (self.count * heads * (self.before + self.width)))
        parts = [
            self._attend(q[:, :, :, at : at + step], k, v, before, mask_STK[:, at : at + step], rules)
            for at in range(0, self.width, step)
        ]
        out = (torch.cat(parts, 3) if len(parts) > 1 else parts[0]).permute(1, 3, 0, 2, 4)
        if self.keeps:
            new = k[:, 0], v[:, 0]
            held = new if before is None else tuple(torch.cat(pair, 1) for pair in zip(before, new))
            self.trunk.layers[layer] = (held[0], held[1])
        return out.reshape(-1, heads, size).index_select(0, self._put)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, mask_STK: Tensor, rules: Rules
    ) -> Tensor:
        """[KV, S, G, T, D] of so many queries, which see keys [KV, S, T', D] and those of the trunk [KV, B, D]."""
        kv, count, group, width, size = q.shape
        q = q.contiguous()
        apart, together = (kv * count, group * width), (kv, count * group * width)
        parts = [torch.bmm(q.view(*apart, size), k.flatten(0, 1).transpose(1, 2)).view(*together, -1)]
        if before is not None:
            parts.insert(0, torch.bmm(q.view(*together, size), before[0].transpose(1, 2)))
        scores = (torch.cat(parts, -1) if before is not None else parts[0]).mul_(rules.scale)
        if rules.softcap is not None:
            scores = torch.tanh(scores / rules.softcap) * rules.softcap
        scores = scores.view(kv, count, group, width, -1).add_(mask_STK[:, None])
        if rules.sinks is not None:
            sinks = rules.sinks.to(scores.dtype).view(kv, 1, group, 1, 1).expand(-1, count, -1, width, 1)
            scores = torch.cat([scores, sinks], -1)
        share = scores.softmax(-1)[..., : self.before + self.width]
        out = torch.bmm(share[..., self.before :].reshape(*apart, -1), v.flatten(0, 1)).view(q.shape)
        if before is not None:
            out += torch.bmm(share[..., : self.before].reshape(*together, -1), before[1]).view(q.shape)
        return out

    def _side_by_side(self, flat_NHD: Tensor) -> Tensor:
        """[S, T, H, D]; what pads a text repeats its last token."""
        return flat_NHD.index_select(0, self._take).view(self.count, self.width, *flat_NHD.shape[1:])

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[S, T, B + T] to add to scores: 0 where a token sees another, the lowest number where it does not."""
        key = window, dtype
        if key not in self._masks:
            seen_STK = torch.cat([torch.ones(self.count, self.width, self.before, dtype=torch.bool), self._seen_STT], 2)
            if window is not None:
                deep_SK = torch.cat([torch.arange(-self.before, 0).expand(self.count, -1), self._deep_ST], 1)
                seen_STK &= self._deep_ST[:, :, None] - deep_SK[:, None] < window
            mask_STK = torch.zeros(seen_STK.shape, dtype=dtype).masked_fill_(~seen_STK, torch.finfo(dtype).min)
            self._masks[key] = mask_STK.to(self.device)
        return self._masks[key]


@torch.no_grad()
def grow_trunk(model: LoadedModel, trunk: Trunk, ids: tuple[int, ...]) -> None:
    """Make the trunk `ids`: what it has in common with them stays, the rest is read."""
    trunk.cut(shared_length([trunk.ids, ids]))
    for start in range(len(trunk.ids), len(ids), PIECE):
        piece = ids[start : start + PIECE]
        read_trees(model, [Tree(piece, tuple(range(-1, len(piece) - 1)))], trunk, keeps=True)
        trunk.ids += piece


def shared_length(rows: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens are the same in all rows."""
    low, high = min(rows), max(rows)  # in the order of a dictionary all others lie between these two
    return next((at for at, (one, other) in enumerate(zip(low, high)) if one != other), min(len(low), len(high)))


@torch.no_grad()
def read_trees(model: LoadedModel, trees: Sequence[Tree], trunk: Trunk, *, keeps: bool = False) -> Tensor:
    """[N, E]: the last hidden states of all tokens of the texts, end to end, in eval mode; `keeps` as in `Trees`."""
    network, training = model.network, model.module.training
    steps = Trees(trees, trunk, model.device, keeps=keeps)
    ids_N = torch.tensor([token for tree in trees for token in tree.ids], device=model.device)
    inputs = {"input_ids": ids_N[None], "position_ids": steps.places_N[None], "segments": steps}
    if hasattr(network.config, "use_cache"):
        inputs["use_cache"] = False
    model.module.eval()
    try:
        with packed_attention(network):
            states_NE: Tensor = network.base_model(**inputs).last_hidden_state[0]
            return states_NE
    finally:
        model.module.train(training)
