"""Looking back from a model in training to what it was at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.core.types import Encoded
from luthier.data.batches import Batch
from luthier.engine.passes import run_rows
from luthier.models.cross_entropy import token_nll
from luthier.models.output import head_of
from luthier.models.packed import hidden_states
from luthier.models.spec import LoadedModel


class Reference:
    """The weights that learn as they were when this was made: a copy of them and of nothing else.

    For an adapter that is its own small matrices, so no second model is held; for full tuning it is a second model.
    """

    def __init__(self, model: LoadedModel):
        self._model = model
        learning = [(name, one) for name, one in model.module.named_parameters() if one.requires_grad]
        # Of weights that are shared out, each process keeps its part.
        self._held = {name: one.detach().clone() for name, one in learning}

    @property
    def size(self) -> int:
        """Bytes of the copy, of all processes together where it is shared out."""
        return sum(copy.numel() * copy.element_size() for copy in self._held.values())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model computes with the weights of the start; not while gradients are being made."""
        learning = {name: one for name, one in self._model.module.named_parameters() if name in self._held}
        now = {name: one.data for name, one in learning.items()}
        for name, one in learning.items():
            one.data = _whole(self._held[name]).to(one.dtype)
        try:
            yield
        finally:
            for name, one in learning.items():
                one.data = now[name]


def _whole(copy: Tensor) -> Tensor:
    return copy.full_tensor() if hasattr(copy, "full_tensor") else copy


def log_probs(
    model: LoadedModel, rows: Sequence[Encoded], head: Callable[[LoadedModel], Any] = head_of
) -> list[np.ndarray]:
    """[N] for each row: log p of every token given those before it in its text, fp32, in eval mode; 0 for a first token."""
    found: list[np.ndarray] = [np.empty(0)] * len(rows)

    def compute(model: LoadedModel, batch: Batch) -> Tensor:
        states_NE = hidden_states(model, batch.ids_N, batch.lengths, batch.parents)[batch.previous_N]
        log_N = -token_nll(head(model), states_NE, batch.ids_N)
        log_N[batch.previous_N == torch.arange(len(log_N), device=log_N.device)] = 0
        return log_N

    def keep(part: list[int], log_N: Tensor) -> None:
        pieces = log_N.cpu().split([len(rows[at].ids) for at in part])  # type: ignore[no-untyped-call]
        for at, one in zip(part, pieces):
            found[at] = one.double().numpy()

    run_rows(model, rows, compute, keep)
    return found
