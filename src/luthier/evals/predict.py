"""Examples to predictions, by what the model was made to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import (
    Chat,
    Encoded,
    Example,
    Labelled,
    Message,
    Pair,
    Prediction,
    Text,
    last_answer,
    prompt_of,
)
from luthier.engine.sampling import Sampling

if TYPE_CHECKING:
    import torch

    from luthier.data.batches import Batch
    from luthier.models.spec import LoadedModel


def predict_examples(
    model: LoadedModel,
    examples: Sequence[Example],
    *,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    likelihood: bool = False,
    tokens: int | None = None,
    events: Events | None = None,
) -> list[Prediction]:
    """One prediction for each example, in order, with its gold.

    Classifiers and regressors read labelled rows. Language models score plain text by likelihood; of conversations
    and pairs they write the last answer, or, with `likelihood`, score it. Raises DataError for rows that do not fit.
    """
    from luthier.engine.generate import generate, tell_engine, tell_guesses
    from luthier.engine.pooled import predict

    def tell(done: int, total: int) -> None:
        if events is not None:
            events.emit("progress", name="judging", done=done, total=total)

    task = model.spec.task
    wanted = (Labelled,) if task in ("classify", "regress") else (Pair,) if task == "seq2seq" else (Text, Chat, Pair)
    for example in examples:
        if not isinstance(example, wanted):
            names = " or ".join(kind.__name__ for kind in wanted)
            raise DataError(
                f"{example.id}: a model made to {task} is judged on {names} rows, this is {type(example).__name__}"
            )
    if task in ("classify", "regress"):
        rows = [example for example in examples if isinstance(example, Labelled)]
        found = predict(model, [(row.text, row.pair) for row in rows], on_progress=tell, tokens=tokens, events=events)
        return [replace(one, id=row.id, gold=row.label) for one, row in zip(found, rows)]
    if task == "masked":
        return _score_masked(model, examples, tell, tokens, events)
    if likelihood or isinstance(examples[0], Text):
        encoded = [_encode(model, example) for example in examples]
        scored = []
        for example, (nll, count) in zip(examples, _score_parts(model, encoded, tell, tokens, events)):
            text = _gold_of(example)
            size = len(text.encode())
            scored.append(
                Prediction(example.id, None, None, nll=nll, tokens=round(count), bytes=size, input=text[:2000])
            )
        return scored
    prompts, tools = zip(*(prompt_of(example) for example in examples))
    if events is not None:
        tell_engine(model, sampling or Sampling(), events)
    written = generate(model, prompts, sampling, batch_size=batch_size, tools=tools, on_progress=tell)
    if events is not None:
        tell_guesses(written, events)
    endless = sum(one.finish == "length" for one in written)
    if endless and events is not None:
        events.warn(f"of {len(written)} answers reached max_tokens without an end of their own", endless)
    return [
        Prediction(example.id, one.text.strip(), _gold_of(example), input=_shown(prompt))
        for example, prompt, one in zip(examples, prompts, written)
    ]


def _encode(model: LoadedModel, example: Example) -> list[Encoded]:
    """The pieces of an example that fit the context; a long text is scored piece by piece, the first token of each
    later piece conditioned on the last of the one before."""
    if isinstance(example, Chat):
        return [model.renderer.chat(example)]
    if isinstance(example, Pair):
        return [model.renderer.pair(example)]
    assert isinstance(example, Text)
    ids = list(model.tokenizer(example.text, add_special_tokens=True, verbose=False)["input_ids"])
    end = model.tokenizer.eos_token_id
    # A document stands after the end of another one, as in pretraining, so its first token is predicted too.
    start = [] if end is None or (ids and ids[0] == model.tokenizer.bos_token_id) else [end]
    stream, length = start + ids, model.spec.max_length
    pieces = []
    for at in range(0, max(1, len(stream) - 1), length - 1):
        piece = tuple(stream[at : at + length])
        pieces.append(Encoded(example.id, piece, (0.0, *[1.0] * (len(piece) - 1))))
    return pieces


def _score_parts(
    model: LoadedModel,
    encoded: Sequence[Sequence[Encoded]],
    tell: Callable[[int, int], None],
    tokens: int | None,
    events: Events | None,
) -> list[tuple[float, float]]:
    from luthier.engine.likelihood import score

    flat = [piece for pieces in encoded for piece in pieces]
    found = iter(score(model, flat, tokens=tokens, on_progress=tell, events=events))
    totals = []
    for pieces in encoded:
        scored = [next(found) for _ in pieces]
        totals.append((sum(one[0] for one in scored), sum(one[1] for one in scored)))
    return totals


def _score_masked(
    model: LoadedModel,
    examples: Sequence[Example],
    tell: Callable[[int, int], None],
    tokens: int | None,
    events: Events | None,
) -> list[Prediction]:
    """Pseudo-likelihood (Salazar et al. 2020, arXiv:1910.14659): each token masked in turn, the rest in sight."""
    from luthier.engine.passes import TOKENS, run_rows
    from luthier.models.cross_entropy import token_nll
    from luthier.models.output import head_of
    from luthier.models.packed import hidden_states

    special, mask, length = set(model.tokenizer.all_special_ids), model.tokenizer.mask_token_id, model.spec.max_length

    def compute(model: LoadedModel, batch: Batch) -> torch.Tensor:
        places_M = batch.places_M
        hidden_ME = hidden_states(model, batch.ids_N.index_fill(0, places_M, mask), batch.lengths)[places_M]
        return token_nll(head_of(model), hidden_ME, batch.ids_N[places_M])

    found: list[Prediction] = []
    for number, example in enumerate(examples, 1):
        assert isinstance(example, Text)
        ids = model.tokenizer(example.text, verbose=False)["input_ids"]
        # A text beyond the context is read piece by piece, as it is learned. In each row one token is masked, and weighs.
        rows = [
            Encoded(example.id, tuple(piece), tuple(float(at == place) for at in range(len(piece))))
            for piece in (ids[at : at + length] for at in range(0, len(ids), length))
            for place, token in enumerate(piece)
            if token not in special
        ]
        lost: list[float] = []

        def keep(part: list[int], nll_M: torch.Tensor, lost: list[float] = lost) -> None:
            lost += nll_M.double().tolist()

        run_rows(model, rows, compute, keep, tokens=tokens or TOKENS, events=events)
        found.append(
            Prediction(example.id, None, None, nll=sum(lost), tokens=len(rows), input=_gold_of(example)[:2000])
        )
        tell(number, len(examples))
    return found


def _gold_of(example: Example) -> str:
    if isinstance(example, Chat):
        return example.messages[last_answer(example)].content
    if isinstance(example, Pair):
        return example.target
    assert isinstance(example, Text)
    return example.text


def _shown(prompt: str | Sequence[Message]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
