"""What a model is asked: passages by number, and the question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from luthier.core.errors import ConfigError, DataError
from luthier.core.types import Message
from luthier.retrieval.passage import Hit, Passage
from luthier.retrieval.words import is_dense

ASKED = {
    "en": "Answer the question from the numbered passages alone. After each statement cite its passage as [1]. If the passages "
    "do not answer the question, say: {unknown}",
    "zh": "请只根据下面编号的资料回答问题，并在每个论断后用 [1] 的形式注明出处。如果资料中没有答案，请回答：{unknown}",
}
UNKNOWN = {"en": "I do not know.", "zh": "我不知道。"}
QUESTION = {"en": "Question: {}", "zh": "问题：{}"}


@dataclass(frozen=True, slots=True)
class Source:
    """A passage with the number that it is cited by, from 1."""

    number: int
    hit: Hit

    @property
    def passage(self) -> Passage:
        return self.hit.passage


def question_of(turns: Sequence[Message]) -> str:
    """What a conversation asks: its last turn. Raises ConfigError for one that is not the user's."""
    if not turns or turns[-1].role != "user":
        raise ConfigError("index: a conversation is answered from an index where its last turn is the user's")
    return turns[-1].content


def ways_of(turns: Sequence[Message]) -> tuple[str, ...]:
    """How a conversation is looked up: its last turn, and where the user spoke before, that with the user's turn before it, for
    a follow-up leaves out what was said. Raises ConfigError as `question_of`."""
    question = question_of(turns)
    before = [turn.content for turn in turns[:-1] if turn.role == "user" and turn.content.strip()][-1:]
    return (question, *(f"{one}\n{question}" for one in before))


def language_of(question: str) -> str:
    """The language in which a question is answered, by its script: "zh" or "en"."""
    return "zh" if is_dense(question) else "en"


def say_unknown(question: str) -> str:
    """What is said to a question that the passages do not answer, in its language."""
    return UNKNOWN[language_of(question)]


def build_prompt(question: str, sources: Sequence[Source]) -> str:
    """What a model is asked: the rules, the passages by number, and the question last, in the question's language."""
    language = language_of(question)
    rules = ASKED[language].format(unknown=UNKNOWN[language])
    passages = [
        f"[{one.number}] {' › '.join((one.passage.file, *one.passage.heading))}\n{one.passage.shown}" for one in sources
    ]
    return "\n\n".join([rules, *passages, QUESTION[language].format(question)])


def offer_prompts(question: str, sources: Sequence[Source]) -> Iterator[tuple[str, tuple[Source, ...]]]:
    """The prompt with all of the sources, then with ever fewer, the best first, and those: who takes the first that fits has as
    many as can be. Raises DataError where not even one was taken."""
    for count in range(len(sources), 0, -1):
        yield build_prompt(question, sources[:count]), tuple(sources[:count])
    raise DataError(
        "not one passage fits the model's context beside the question and room for an answer; ask for fewer tokens "
        "(max_tokens), index with smaller passages (chunking.size), or use a model with a longer context"
    )


def fit_prompt(question: str, sources: Sequence[Source], fits: Callable[[str], bool]) -> tuple[str, tuple[Source, ...]]:
    """The prompt with as many of the sources, the best first, as `fits` allows, and those. Raises DataError where not even
    one fits."""
    return next(one for one in offer_prompts(question, sources) if fits(one[0]))
