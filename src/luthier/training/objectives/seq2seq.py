"""Learn to turn one text into another with an encoder-decoder: translation, summaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Encoded, Example, Pair
from luthier.data.batches import Batch
from luthier.models.spec import LoadedModel, ModelSpec
from luthier.training.objectives.part import Loss, Objective, encode_rows


class Seq2Seq(Objective):
    """Cross-entropy on the target's tokens, given the source and the target so far."""

    kind: ClassVar[str] = "seq2seq"
    wants: ClassVar[tuple[type, ...]] = (Pair,)

    smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the probability mass spread over the vocabulary (0.1 is usual for translation from scratch)."""

    def check_model(self, spec: ModelSpec) -> None:
        if spec.task != "seq2seq":
            other = "'sft'" if spec.kind == "decoder" else "'classify' or 'regress'"
            raise ConfigError(
                f"objective 'seq2seq' needs an encoder-decoder model; {spec.source} ({spec.kind}, {spec.task}) is none: "
                f"use {other}, or another model"
            )

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        self.check_examples(examples)
        return encode_rows(examples, model.renderer.pair, events)

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        assert batch.target_BS is not None and batch.target_weights_BS is not None
        start = model.module.config.decoder_start_token_id
        if start is None:
            raise ConfigError(
                "the model's config.json has no decoder_start_token_id, so its decoder cannot be started; set it"
            )
        # Teacher forcing: the decoder sees the target one place later, from its start token on.
        shifted_BS = batch.target_BS.roll(1, dims=1)
        shifted_BS[:, 0] = start
        logits_BSV = model.module(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT, decoder_input_ids=shifted_BS, use_cache=False
        ).logits
        learned = batch.target_weights_BS > 0
        nll_N = F.cross_entropy(
            logits_BSV[learned].float(), batch.target_BS[learned], reduction="none", label_smoothing=self.smoothing
        )
        return Loss((nll_N * batch.target_weights_BS[learned]).sum(), batch.weight), None
