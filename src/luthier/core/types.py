"""The nouns that flow between floors. Plain frozen dataclasses: parsed at the door, trusted in the corridor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Task: TypeAlias = Literal["causal", "masked", "seq2seq", "classify", "regress"]
"""What a loaded model computes: next tokens, masked tokens, a target text, class scores, one number."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `weight` scales the loss of an assistant turn (None: 1.0)."""

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text to continue or to fill in."""

    id: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; assistant turns are what is learned."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text (or a pair of texts) with its gold: one class name, several class names, a number, or None when unknown."""

    id: str
    text: str
    label: str | tuple[str, ...] | float | None
    pair: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """A source and the target to produce from it: prompt and completion, sentence and translation, article and summary."""

    id: str
    source: str
    target: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, the first liked better, by `margin` where that is known.

    An answer is one turn of the assistant, or several turns that begin and end with the assistant's.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    margin: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Feedback:
    """An answer to a prompt, and whether it is good."""

    id: str
    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    good: bool
    tools: tuple[dict[str, Any], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


Example: TypeAlias = Text | Chat | Labelled | Pair | Preference | Feedback


def last_answer(chat: Chat) -> int:
    """Which of its messages is the assistant's last."""
    return max(at for at, message in enumerate(chat.messages) if message.role == "assistant")


def prompt_of(example: Example) -> tuple[str | tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """What is answered by the target of a pair, or by the last answer of a conversation; and the tools at hand."""
    if isinstance(example, Pair):
        return example.source, ()
    assert isinstance(example, Chat)
    return example.messages[: last_answer(example)], example.tools


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as the model sees it.

    `ids` are token ids, `weights` one float a token: how much predicting *that* token counts (0: context only).
    For an encoder-decoder `target` and `target_weights` hold the decoder side, and `weights` stays empty.
    For a classifier or regressor `gold` is a class index, a multi-hot tuple, or a number; `weight` scales the row.
    """

    id: str
    ids: tuple[int, ...]
    weights: tuple[float, ...] = ()
    target: tuple[int, ...] = ()
    target_weights: tuple[float, ...] = ()
    gold: int | float | tuple[float, ...] | None = None
    weight: float = 1.0
    segments: tuple[int, ...] = ()
    """Lengths of the texts in a row of packed text, each of which attends to itself alone; empty: the row is one."""
    parents: tuple[int, ...] = ()
    """For each of `segments` the one in this row whose tokens it continues (a shared prompt), or -1; empty: none does."""
    cut: int = 0
    """Tokens cut off to fit the context (0 unless the user asked for truncation)."""
    source: str = ""
    """The source that it came from, where there are several."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its error bar: `value`, the interval [`low`, `high`] at `level`, from `n` items, by `method`."""

    value: float
    low: float
    high: float
    n: int
    method: str
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model said of one item, kept for every item of an evaluation.

    `output` is generated text, a class name, several class names, or a number; `probabilities` by class name where
    there are classes; `nll` and `tokens` where the item was scored by likelihood (nats, and the tokens that count).
    """

    id: str
    output: str | tuple[str, ...] | float | None
    gold: str | tuple[str, ...] | float | None = None
    probabilities: dict[str, float] | None = None
    nll: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    input: str = ""


@dataclass(frozen=True, slots=True)
class TokenLog:
    """A token of an answer and how likely it was, in nats: `raw` by the model, `processed` by what was drawn from, after all
    settings (-inf: it could not come; at temperature 0, where nothing is drawn, after bias, penalties and bans; None: a
    server wrote it, and does not tell).

    `text` is what it adds to the text before it. `top` holds the likeliest tokens in its place by `raw`, the likeliest first.
    """

    id: int
    text: str
    raw: float
    processed: float | None
    top: tuple[TokenLog, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one generation request. `finish` is "stop" (a stop token or string) or "length".

    `logprobs` has one entry for each of `ids`, and `prompt_logprobs` one for each token of the prompt but the first (in
    nats, by the model), where they were asked for; `prompt_top` the likeliest tokens in the place of each of those, with
    theirs, as many as `logprobs` asks for. `others` are further answers to the same prompt. Of its tokens `drafted`
    were guessed before the model read them, and `accepted` guessed right.
    """

    text: str
    ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    prompt_tokens: int
    logprobs: tuple[TokenLog, ...] | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()
    others: tuple[Completion, ...] = ()
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)
