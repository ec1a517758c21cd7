"""Which of given labels a language model finds likeliest after a text, and how likely one is after a pair: asked between the
engine's steps, nothing written."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, DataError
from luthier.core.types import Message, Prediction
from luthier.data.turns import read_messages
from luthier.engine.judging import Judge, Judging
from luthier.engine.labelling import Labelling
from luthier.engine.labels import Labeller
from luthier.engine.scoring import Scorer

if TYPE_CHECKING:
    from luthier.faces.server.hands import Hands

# Texts between two steps of those that are written: more of them keep the others waiting.
AT_ONCE = 8


async def label(hands: Hands, message: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The label of each of `inputs`, a text or a conversation, with the probability of each label, as `luthier generate --labels`
    finds them."""
    model = hands.model
    if model.spec.task == "classify":
        raise ConfigError(
            f"labels: {hands.called(message)} was tuned to classify, and has labels of its own; leave labels out"
        )
    labelling = Labelling.make(message["labelling"], where="labelling")
    shots = [(text, of) for text, of in message["shots"]]
    items = [(f"input.{at}", _item(one)) for at, one in enumerate(message["inputs"])]
    found: list[Prediction] = []
    async with _scorer(hands, message.get("adapter", "")) as scorer:
        labeller = Labeller(model, message["labels"], labelling, shots=shots, raw=message["raw"], scorer=scorer)
        for start in range(0, len(items), AT_ONCE):
            found += await hands.door.ask(partial(_predict, labeller, items[start : start + AT_ONCE]))
    answers = [{"output": one.output, "probabilities": one.probabilities} for one in found]
    usage = {"prompt": labeller.read, "written": 0, "reused": 0, "drafted": 0, "accepted": 0}
    yield {"end": {"answers": answers, "usage": usage}}


def _predict(labeller: Labeller, items: Sequence[tuple[str, str | Sequence[Message]]], _: object) -> list[Prediction]:
    return labeller.predict(items)


async def judge(hands: Hands, message: dict[str, Any], judging: Judging) -> tuple[list[float], int]:
    """The score of each of `pairs`, and how many tokens were read."""
    pairs = [(one, other) for one, other in message["pairs"]]
    found: list[float] = []
    async with _scorer(hands, message.get("adapter", "")) as scorer:
        made = Judge(hands.model, judging, scorer)
        for start in range(0, len(pairs), AT_ONCE):
            found += await hands.door.ask(partial(_judge, made, pairs[start : start + AT_ONCE]))
    return found, made.read


@asynccontextmanager
async def _scorer(hands: Hands, adapter: str) -> AsyncIterator[Scorer]:
    """The model's own, which goes on with what it has read; or one of an adapter, one of all requests at a time, which keeps
    nothing."""
    if not adapter:
        yield await hands.door.ask(lambda engine: engine.scorer())
        return
    async with hands.lending:
        scorer = await hands.door.ask(lambda engine: engine.scorer(adapter))
        try:
            yield scorer
        finally:
            # After all that the engine's thread was asked to do with it, and before what the next one asks.
            hands.door.tell(lambda _: scorer.let_go())


def _judge(judge: Judge, pairs: Sequence[tuple[str, str]], _: object) -> list[float]:
    return judge.score(pairs)


def _item(one: Any) -> str | Sequence[Message]:
    if isinstance(one, str):
        return one
    try:
        return read_messages(one, "messages")
    except DataError as err:
        raise DataError(f"messages: {err}") from None
