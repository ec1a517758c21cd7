"""Learn to give answers a number by which the liked ones get more: a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Encoded, Example, Preference, Task
from luthier.data.batches import Batch
from luthier.engine.answers import answer_rewards
from luthier.models.spec import LoadedModel, ModelSpec
from luthier.training.objectives.answers import batch_answers, compare_metrics, encode_row
from luthier.training.objectives.part import Loss, Objective, encode_rows


class Reward(Objective):
    """A Bradley-Terry model of preferences (Ouyang et al. 2022, arXiv:2203.02155): one number from the state of the last
    token of an answer, the end of its turn, and the loss of a row -log sigmoid(chosen - rejected - margin).

    Rows may state a margin, by which the chosen answer should lead (Touvron et al. 2023, arXiv:2307.09288). The number
    means something only against that of another answer to the same prompt. Decoder-only models.
    """

    kind: ClassVar[str] = "reward"
    wants: ClassVar[tuple[type, ...]] = (Preference,)
    task: ClassVar[Task | None] = "regress"
    metric: ClassVar[tuple[str, int]] = ("preference_accuracy", +1)

    center: float = Field(0.0, ge=0)
    """Weight of (chosen + rejected)^2, which keeps rewards around 0 (Eisenstein et al. 2023, arXiv:2312.09244); 0: none."""

    def check_model(self, spec: ModelSpec) -> None:
        if spec.kind != "decoder" or spec.pooling != "last":
            raise ConfigError(
                f"objective 'reward' reads the last token of a decoder-only model; {spec.source} is of the kind {spec.kind}, "
                f"read with pooling {spec.pooling!r}: use another model, and pooling 'auto' or 'last'"
            )

    def load_options(self, train: Sequence[Example]) -> dict[str, Any]:
        return {"task": self.task, "conversations": True}

    def adapt(self, model: LoadedModel, train: Sequence[Example]) -> None:
        model.spec = model.spec.model_copy(update={"target_mean": 0.0, "target_scale": 1.0})

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        self.check_examples(examples)
        return encode_rows(
            examples,
            lambda one: replace(encode_row(model, one), gold=float(one.margin or 0.0)),
            events,
            renderer=model.renderer,
        )

    def batch(self, rows: Sequence[Encoded], model: LoadedModel, seed: tuple[int, ...]) -> Batch:
        return batch_answers(rows)

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        rewards_R2 = answer_rewards(model, batch)
        assert batch.gold is not None and batch.row_weights_S is not None
        loss_R = self.losses(rewards_R2, batch.gold)
        return Loss((loss_R * batch.row_weights_S).sum(), batch.weight), rewards_R2.detach()

    def losses(self, rewards_R2: Tensor, margin_R: Tensor) -> Tensor:
        """[R] from the rewards of (chosen, rejected)."""
        loss_R = -F.logsigmoid(rewards_R2[:, 0] - rewards_R2[:, 1] - margin_R)
        return loss_R + self.center * rewards_R2.sum(1) ** 2 if self.center else loss_R

    def metrics(self, scores: Tensor, gold: Tensor, model: LoadedModel) -> dict[str, float]:
        return compare_metrics(scores)
