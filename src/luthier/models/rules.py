"""How each layer of a decoder attends: its window, scale and soft-cap, as it asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.models.attention import Rules, packed_attention
from luthier.models.spec import LoadedModel

# The token that is read, and what rounding may change.
TRIED = 6
TOLERANCE = 2e-2


class Unlike(Exception):
    """Why a model is none of these: the end of a sentence that begins with its family."""


class Watch:
    """Stands in for the keys and values of a text of one token, and keeps how each layer asks for its attention."""

    def __init__(self) -> None:
        self.rules: dict[int | None, Rules] = {}
        self.sizes: dict[int | None, tuple[float, float]] = {}
        """Of its queries and keys, which rotary positions leave as they are."""

    def attend(self, layer: int | None, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, rules: Rules) -> Tensor:
        """[N, H, D]: a token that sees itself alone gets its own values."""
        self.rules[layer], self.sizes[layer] = rules, (float(q_NHD.float().norm()), float(k_NKD.float().norm()))
        return v_NKD.repeat_interleave(q_NHD.shape[1] // v_NKD.shape[1], 1)


@torch.no_grad()
def read_rules(model: LoadedModel, layers: int) -> list[Rules]:
    """How each layer attends, as it says when it is called: a config may name a window that no layer has, and the reverse.

    Raises Unlike where they attend in a way of their own, or otherwise far on in a text than at its beginning.
    """
    found = []
    for place in (model.spec.max_length - 1, 0):
        watch = Watch()
        ids_1N, places_1N = (torch.tensor([[one]], device=model.device) for one in (TRIED, place))
        try:
            with packed_attention(model.network):
                model.network.base_model(input_ids=ids_1N, position_ids=places_1N, segments=watch, use_cache=False)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
            raise Unlike("has an attention of its own") from None
        if sorted(watch.rules, key=str) != sorted(range(layers), key=str):
            raise Unlike("has an attention of its own")
        found.append(watch)
    far, near = found
    if not hasattr(model.network.base_model, "wpe"):
        pairs = [pair for at in range(layers) for pair in zip(far.sizes[at], near.sizes[at])]
        if any(abs(one - other) > TOLERANCE * max(one, other) for one, other in pairs):
            raise Unlike("makes the queries or keys of later tokens larger")
    rules = [near.rules[at] for at in range(layers)]
    if any(one.sinks is not None for one in rules):
        raise Unlike("has attention sinks")
    if not all(one.causal for one in rules) or len({(one.scale, one.softcap) for one in rules}) > 1:
        raise Unlike("has layers that attend each in a way of its own")
    return rules
