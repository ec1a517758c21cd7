"""One vector of a text, and scores from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.models.segments import owners
from luthier.models.spec import Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Pooled(nn.Module):
    """A backbone, one pooled vector of each text, and a linear head in fp32.

    Of an encoder-decoder only the encoder runs. Pooling goes by the attention mask, never by the pad id: `mean` over
    the tokens, the `first` token ([CLS]), or the `last`.

    `separator` is the id between two texts of a pair, for models that mark the second text with segment 1 (BERT);
    None for all others.
    """

    def __init__(self, backbone: Any, outputs: int, pooling: Pooling, *, dropout: float, separator: int | None = None):
        super().__init__()
        self.backbone, self.pooling, self.separator = backbone, pooling, separator
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width_of(backbone.config), outputs, dtype=torch.float32)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if isinstance(getattr(backbone, "pooler", None), nn.Module):
            # BERT's own pooler is not used here: kept, its weights would never receive a gradient.
            backbone.pooler = None
        if backbone.config.is_encoder_decoder:
            used = {id(parameter) for parameter in backbone.get_encoder().parameters()}
            for parameter in backbone.parameters():
                parameter.requires_grad_(id(parameter) in used)
        self.to(next(backbone.parameters()).device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [B, C] in fp32 from ids [B, T] and mask [B, T] (1: token, 0: padding)."""
        scores_BC: Tensor = self.head(self.dropout(self.pool(input_ids, attention_mask)))
        return scores_BC

    def score(self, hidden_NE: Tensor, lengths: Sequence[int]) -> Tensor:
        """Scores [S, C] in fp32 from the last hidden states of texts laid end to end."""
        scores_SC: Tensor = self.head(self.dropout(pool_flat(hidden_NE.float(), lengths, self.pooling)))
        return scores_SC

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled vectors [B, E] in fp32."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        backbone = self.backbone
        if backbone.config.is_encoder_decoder:
            backbone = backbone.get_encoder()
        elif hasattr(backbone.config, "use_cache"):
            inputs["use_cache"] = False
        if self.separator is not None:
            ends = (input_ids == self.separator).long()
            inputs["token_type_ids"] = (ends.cumsum(1) - ends).clamp(max=1) * attention_mask.long()
        hidden_BTE = backbone(**inputs).last_hidden_state.float()
        return pool(hidden_BTE, attention_mask, self.pooling)


def pool(hidden_BTE: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """One vector [B, E] of each row's states; `mask_BT` is 1 on tokens and 0 on padding, on either side."""
    if pooling == "mean":
        weights_BT1 = mask_BT.to(hidden_BTE.dtype).unsqueeze(-1)
        return (hidden_BTE * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    held_BT = mask_BT > 0
    if pooling == "last":
        at_B = places_T.masked_fill(~held_BT, -1).max(1).values.clamp(min=0)
    else:
        at_B = held_BT.int().argmax(1)
    return hidden_BTE[torch.arange(len(at_B), device=at_B.device), at_B]


def pool_flat(hidden_NE: Tensor, lengths: Sequence[int], pooling: Pooling) -> Tensor:
    """One vector [S, E] of each text's states."""
    sizes_S = torch.tensor(lengths, device=hidden_NE.device)
    ends_S = sizes_S.cumsum(0)
    if pooling == "mean":
        owner_N = owners(lengths).to(hidden_NE.device)
        sums_SE = hidden_NE.new_zeros(len(lengths), hidden_NE.shape[1]).index_add_(0, owner_N, hidden_NE)
        return sums_SE / sizes_S[:, None]
    return hidden_NE[ends_S - 1 if pooling == "last" else ends_S - sizes_S]


def width_of(config: PreTrainedConfig) -> int:
    """Size of the hidden states."""
    return int(getattr(config, "hidden_size", None) or config.d_model)


def dropout_of(config: PreTrainedConfig) -> float:
    """The dropout that the family puts before a classification head; 0 where it names none."""
    for name in ("classifier_dropout", "hidden_dropout_prob", "dropout_rate"):
        found = getattr(config, name, None)
        if isinstance(found, float):
            return found
    return 0.0
