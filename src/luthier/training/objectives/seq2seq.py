"""Learn to turn one text into another with an encoder-decoder: translation, summaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Encoded, Example, Pair
from luthier.data.batches import Batch
from luthier.engine.likelihood import target_states
from luthier.models.cross_entropy import token_loss
from luthier.models.output import head_of
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
        return encode_rows(examples, model.renderer.pair, events, renderer=model.renderer)

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        assert batch.target_M is not None and batch.target_weights_M is not None
        states_ME = target_states(model, batch)
        loss = token_loss(head_of(model), states_ME, batch.target_M, batch.target_weights_M, self.smoothing)
        return Loss(loss, batch.weight), None
