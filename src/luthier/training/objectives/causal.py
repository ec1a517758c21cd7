"""The loss of a language model on a flat batch: states where something is learned, then the chunked loss."""

from __future__ import annotations

from torch import Tensor

from luthier.data.batches import Batch
from luthier.models.cross_entropy import token_loss
from luthier.models.output import head_of
from luthier.models.packed import hidden_states
from luthier.models.spec import LoadedModel
from luthier.training.objectives.part import Loss


def causal_loss(model: LoadedModel, batch: Batch) -> Loss:
    """Sum of -weight x log p(token | the tokens before it in its segment), fp32. The first of a segment weighs nothing."""
    states_ME, target_M, weight_M = supervised(model, batch)
    return Loss(token_loss(head_of(model), states_ME, target_M, weight_M), batch.weight)


def supervised(model: LoadedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(the states that predict, what they predict, with what weight), for the tokens with a weight."""
    hidden_NE = hidden_states(model, batch.ids_N, batch.lengths, batch.parents)
    places_M = batch.places_M
    return hidden_NE[batch.previous_N[places_M]], batch.ids_N[places_M], batch.weights_N[places_M]
