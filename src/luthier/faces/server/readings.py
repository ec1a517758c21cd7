"""What an engine's process finds in texts that are read once: vectors, classes, numbers, and how two texts belong together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.core.types import Prediction
from luthier.engine.answers import gives_rewards
from luthier.engine.judging import Judging, own_labels
from luthier.engine.pooled import Item, encode_item, prediction_of
from luthier.engine.pooler import Embedding
from luthier.faces.server.labelled import judge
from luthier.models.embedding import made_for_vectors

if TYPE_CHECKING:
    from luthier.faces.server.hands import Hands

T = TypeVar("T")
Ids: TypeAlias = Sequence[int]
# Texts of one request that wait at the door at once.
AT_ONCE = 64


async def embed(hands: Hands, message: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """A vector of each of `texts` (or of `ids`), of length 1 unless `normalise` says otherwise."""
    rows = [hands.framed(one) for one in message["inputs"]]
    vectors = await _vectors(hands, rows, message, message.get("dimensions"))
    yield {"end": {"vectors": [one.tolist() for one in vectors], "usage": _usage(rows)}}


async def classify(hands: Hands, message: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """What a classifier, regressor or reward model says of each of `inputs`: a text, or two."""
    items: list[Item] = [(one, None) if isinstance(one, str) else tuple(one) for one in message["inputs"]]
    rows, found = await _predict(hands, items, message)
    answers = [{"output": one.output, "probabilities": one.probabilities} for one in found]
    yield {"end": {"answers": answers, "usage": _usage(rows)}}


async def relate(hands: Hands, message: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """How each of `pairs` of texts belongs together: the number of a model that reads both at once, the probability of a label
    that a language model gives, or the cosine of their vectors. A language model does what is asked for, or what its files
    say."""
    judging, by_vectors = _way_of(hands, message)
    if judging is not None:
        scores, read = await judge(hands, message, judging)
        yield {"end": {"scores": scores, "usage": {**_usage([]), "prompt": read}}}
        return
    pairs: list[tuple[str, str]] = [(one, other) for one, other in message["pairs"]]
    task = hands.model.spec.task
    if task == "regress" and not by_vectors:
        rows, found = await _predict(hands, list(pairs), message)
        scores = [float(one.output) for one in found]  # type: ignore[arg-type]
    elif task == "classify" and not by_vectors:
        raise ConfigError(
            f"model: {hands.called(message)} gives classes and no number; use one that gives numbers for pairs, or vectors"
        )
    else:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        rows = [hands.framed(text) for text in texts]
        vectors = dict(zip(texts, await _vectors(hands, rows, message)))
        scores = [float(vectors[one] @ vectors[other]) for one, other in pairs]
    yield {"end": {"scores": scores, "usage": _usage(rows)}}


def _way_of(hands: Hands, message: dict[str, Any]) -> tuple[Judging | None, bool]:
    """How a pair is judged by labels, if it is; and whether vectors are asked for. Raises ConfigError for a language model of
    which nothing says what its score is, and for labels that no other model is asked for."""
    model, asked, by_vectors = hands.model, message.get("judging"), message.get("by") == "vectors"
    if model.spec.task != "causal":
        if asked is not None:
            raise ConfigError(
                f"{next(iter(asked))}: {hands.called(message)} is made to {model.spec.task} and says no words, so it is not "
                "asked for labels; leave it out"
            )
        return None, by_vectors
    if by_vectors:
        return None, True
    labels = own_labels(model)
    if asked is None and labels is None:
        if made_for_vectors(model):
            return None, True
        raise ConfigError(
            f"model: {hands.called(message)} is a language model, and nothing says what its score of a pair is: give labels, "
            'such as ["yes", "no"], for the probability of the first, or by: vectors for the cosine of vectors'
        )
    if asked is not None and "labels" not in asked and labels is None:
        raise ConfigError(f'labels: {next(iter(asked))} goes with labels, such as ["yes", "no"]; name them')
    return Judging.make({"labels": labels, **(asked or {})}, where="judging"), False


async def _predict(
    hands: Hands, items: Sequence[Item], message: dict[str, Any]
) -> tuple[list[Sequence[int]], list[Prediction]]:
    model = hands.model
    if model.spec.task not in ("classify", "regress"):
        called, task = hands.called(message), model.spec.task
        if task == "causal":
            raise ConfigError(
                f"labels: {called} is a language model and has none of its own; name the labels that it chooses among"
            )
        raise ConfigError(f"model: {called} is made to {task}, not to classify or to give numbers; choose another")
    second = [item[1] is not None for item in items]
    if any(second) and gives_rewards(model) and not all(second):
        raise ConfigError("input: give a prompt and an answer each time, or an answer alone each time")
    rows = [hands.within(encode_item(model, item, "input").ids) for item in items]
    settings = {name: message[name] for name in ("priority", "tenant") if name in message}
    scores = await _each(hands, rows, lambda ids: hands.door.pool(ids, **settings))
    return rows, [prediction_of(model, one, "", item) for one, item in zip(scores, items)]


async def _vectors(
    hands: Hands, rows: Sequence[Sequence[int]], message: dict[str, Any], dimensions: int | None = None
) -> list[Tensor]:
    embedding = Embedding(normalise=message.get("normalise", True), dimensions=dimensions)
    settings = {name: message[name] for name in ("priority", "tenant", "adapter") if name in message}
    return await _each(hands, rows, lambda ids: hands.door.pool(ids, embedding, **settings))


async def _each(hands: Hands, rows: Sequence[Ids], work: Callable[[Ids], Awaitable[T]]) -> list[T]:
    """What `work` makes of each row, some of them at once: no request fills alone what may wait at the door, or it would be
    refused however idle the engine is. Where one fails the others are left."""
    most, most_tokens = max(1, min(AT_ONCE, hands.waiting // 2)), hands.room // 2
    tasks: list[asyncio.Task[T]] = []
    going: dict[asyncio.Task[T], int] = {}
    try:
        for row in rows:
            while going and (len(going) >= most or sum(going.values()) + len(row) > most_tokens):
                done, _ = await asyncio.wait(going, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del going[task]
                    task.result()
            tasks.append(asyncio.ensure_future(work(row)))
            going[tasks[-1]] = len(row)
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _usage(rows: Sequence[Sequence[int]]) -> dict[str, int]:
    read = sum(len(row) for row in rows)
    return {"prompt": read, "written": 0, "reused": 0, "drafted": 0, "accepted": 0}
