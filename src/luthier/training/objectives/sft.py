"""Learn to answer: supervised fine-tuning on conversations, or on prompts with their completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Chat, Encoded, Example, Pair
from luthier.data.batches import Batch
from luthier.models.spec import LoadedModel, ModelSpec
from luthier.training.objectives.causal import causal_loss
from luthier.training.objectives.part import Loss, Objective, encode_rows


class SFT(Objective):
    """Cross-entropy on what the assistant says, its end-of-turn token included; everything else is context."""

    kind: ClassVar[str] = "sft"
    wants: ClassVar[tuple[type, ...]] = (Chat, Pair)

    def check_model(self, spec: ModelSpec) -> None:
        if spec.task != "causal":
            other = "'seq2seq'" if spec.kind == "encoder-decoder" else "'classify' or 'regress'"
            raise ConfigError(
                f"objective 'sft' needs a decoder-only model that writes text; {spec.source} ({spec.kind}, {spec.task}) "
                f"does not: use {other}, or another model"
            )

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        self.check_examples(examples)
        render = model.renderer
        return encode_rows(
            examples,
            lambda one: render.chat(one) if isinstance(one, Chat) else render.pair(one),
            events,
            renderer=render,
        )

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        return causal_loss(model, batch), None
