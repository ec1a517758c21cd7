"""What a model says of answers to a prompt that is read once: their log-probabilities, or rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Encoded, Feedback, Message, Preference
from luthier.data.batches import Batch
from luthier.engine.passes import run_rows
from luthier.models.cross_entropy import token_nll
from luthier.models.output import head_of
from luthier.models.packed import hidden_states
from luthier.models.segments import owners
from luthier.models.spec import LoadedModel
from luthier.text.answers import render_answers


def encode_answers(model: LoadedModel, example: Preference | Feedback) -> Encoded:
    """The prompt, then the chosen and the rejected answer, or the one that there is. Raises DataError."""
    answers = [example.answer] if isinstance(example, Feedback) else [example.chosen, example.rejected]
    return render_answers(model.renderer, example.prompt, answers, example.tools, example.id)


def answer_logs(model: LoadedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """[R, A] twice, for R rows of one prompt and A answers each: the sum of weight x log p over the tokens of each
    answer, given the prompt and the answer so far, in fp32; and the sum of weights. Differentiable."""
    hidden_NE = hidden_states(model, batch.ids_N, batch.lengths, batch.parents)
    places_M = batch.places_M
    weights_M = batch.weights_N[places_M]
    nll_M = token_nll(head_of(model), hidden_NE[batch.previous_N[places_M]], batch.ids_N[places_M])
    owner_M = owners(batch.lengths).to(places_M.device)[places_M]
    empty_S = nll_M.new_zeros(len(batch.lengths))
    logs_S, counts_S = empty_S.index_add(0, owner_M, -nll_M * weights_M), empty_S.index_add(0, owner_M, weights_M)
    return _of_answers(logs_S, batch), _of_answers(counts_S, batch)


def answer_rewards(model: LoadedModel, batch: Batch) -> Tensor:
    """[R, A]: what a reward model gives each answer, read at its last token, in fp32. Differentiable."""
    hidden_NE = hidden_states(model, batch.ids_N, batch.lengths, batch.parents)
    return _of_answers(model.module.score(hidden_NE, batch.lengths).squeeze(-1), batch)  # type: ignore[operator]


def score_answers(
    model: LoadedModel,
    rows: Sequence[Encoded],
    *,
    tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    events: Events | None = None,
) -> NDArray[np.float64]:
    """[N, A, 2]: (sum of log p, tokens) of the answers of each row, in order, in eval mode; of a reward model (reward, 1).

    `tokens` go through the model at once.
    """
    found = np.empty((len(rows), sum(up >= 0 for up in rows[0].parents), 2))

    def keep(part: list[int], pair_RA2: Tensor) -> None:
        found[part] = pair_RA2.double().cpu().numpy()

    run_rows(model, rows, answer_scores, keep, tokens=tokens, on_progress=on_progress, events=events)
    return found


def answer_scores(model: LoadedModel, batch: Batch) -> Tensor:
    """[R, A, 2]: (sum of log p, tokens) of each answer; of a reward model (reward, 1)."""
    if gives_rewards(model):
        rewards_RA = answer_rewards(model, batch)
        return torch.stack((rewards_RA, torch.ones_like(rewards_RA)), -1)
    return torch.stack(answer_logs(model, batch), -1)


def gives_rewards(model: LoadedModel) -> bool:
    """Whether it is a reward model: it reads a conversation and gives its last answer a number."""
    return model.spec.task == "regress" and model.spec.learned == "reward"


def encode_scored(model: LoadedModel, item: tuple[Message, ...] | tuple[str, str | None], id: str) -> Encoded:
    """What a reward model reads: a conversation, a prompt and an answer, or an answer alone (to nothing). Raises DataError."""
    if item and isinstance(item[0], Message):
        turns = tuple(turn for turn in item if isinstance(turn, Message))
    else:
        # Chat templates cannot begin with an answer.
        prompt, answer = ("", item[0]) if item[1] is None else item
        turns = (Message("user", str(prompt)), Message("assistant", str(answer)))
    if turns[-1].role != "assistant":
        raise DataError(f"{id}: a reward model scores an answer, and these turns end with one of the {turns[-1].role}")
    row = render_answers(model.renderer, turns[:-1], [turns[-1:]], (), id)
    return Encoded(id, row.ids, cut=row.cut)


def _of_answers(values_S: Tensor, batch: Batch) -> Tensor:
    """[R, A] of the segments that have a parent."""
    answers = [at for at, up in enumerate(batch.parents) if up >= 0]
    return values_S[answers].view(len(batch.names), -1)
