"""A reward that a model learned to give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import PrivateAttr

from luthier.core.errors import ConfigError
from luthier.engine.pooled import predict
from luthier.models.load import load_model
from luthier.models.spec import LoadedModel
from luthier.training.rewards.part import Answer, Reward


class Model(Reward):
    """The number that a model tuned to `regress` gives for prompt and answer, its two texts; what is too long is cut."""

    kind: ClassVar[str] = "model"

    model: str
    """Which model: run:<id>, a directory, or a hub id."""
    prompt: bool = True
    """Give it the prompt as the first text and the answer as the second; false: the answer alone."""
    _loaded: LoadedModel | None = PrivateAttr(None)

    def ready(self, device: torch.device) -> None:
        model = load_model(self.model, truncate=True, device=str(device))
        if model.spec.task != "regress":
            raise ConfigError(
                f"rewards.model: {self.model} is made to {model.spec.task}; a reward is a number: tune one with "
                "objective 'regress'"
            )
        model.module.requires_grad_(False)
        self._loaded = model

    def score(self, answers: Sequence[Answer]) -> list[float]:
        assert self._loaded is not None  # ready() comes first
        items = [(one.prompt, one.output) if self.prompt else (one.output, None) for one in answers]
        return [float(one.output) for one in predict(self._loaded, items)]  # type: ignore[arg-type]
