"""Examples to token ids and weights: the one renderer of training, evaluation and inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from luthier.core.errors import DataError, ModelError
from luthier.core.types import Chat, Encoded, Message, Pair, Text
from luthier.text.controls import MARK, Controls
from luthier.text.spans import SENTINEL, Span, find_spans
from luthier.text.template import Template

# How many conversations are checked for the prompt's tokens being the first tokens of the whole.
CHECKED = 50


class Renderer:
    """Turns examples into ids and weights, and prompts into the ids to go on from.

    A weight says how much *predicting* its token counts. Weights are made from the characters of the rendered text
    and the place of each token in it, never by comparing ids with the pad token. `stop_ids` are the tokens that end
    a generated text: the end of a turn as the template writes it, and the end of text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        kind: Literal["decoder", "encoder", "encoder-decoder"],
        template: Template | None,
        max_length: int,
        truncate: bool = False,
        learn: Literal["all", "last"] = "all",
    ):
        self.tokenizer, self.kind, self.template = tokenizer, kind, template
        self.max_length, self.truncate, self.learn = max_length, truncate, learn
        self.guarded = 0
        """Times that a turn of a user or a tool spelt a control token, which was taken as text."""
        self._controls = Controls(tokenizer)
        plain, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        at = next((at for at in range(len(framed)) if framed[at : at + len(plain)] == plain), 0)
        self._first = list(framed[:at]) if kind == "decoder" else []
        self._end = tokenizer.eos_token_id
        self._tail = ""
        self.turn_end: str | None = (
            self._find_turn_end() if template is not None and template.name != "raw" else tokenizer.eos_token
        )
        stops = [tokenizer.convert_tokens_to_ids(self.turn_end) if self.turn_end else None, self._end]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(int(stop) for stop in stops if stop is not None))
        self._checked = 0
        self.mismatches = 0
        """Prompts that do not tokenise as the beginning of the whole: the seam between train and serve."""

    @property
    def first_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts in front of every text of a decoder (BOS)."""
        return tuple(self._first)

    @property
    def unknown_id(self) -> int | None:
        """The token that stands for text outside the vocabulary, where it stands for nothing else."""
        token = self.tokenizer.unk_token
        others = ("bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token")
        if token is None or token in (getattr(self.tokenizer, name, None) for name in others):
            return None
        return int(self.tokenizer.unk_token_id)

    # -- to learn from ------------------------------------------------------------------------------------------------

    def text(self, example: Text) -> Encoded:
        """A document: every token but the first is learned, the end-of-text token with them."""
        if self.kind != "decoder":
            ids = self._framed(example.text)
            fitted, weights, cut = self._fit(ids, [0.0] + [1.0] * (len(ids) - 1), example.id)
            return Encoded(example.id, fitted, weights, cut=cut)
        ids = self._first + self._controls.ids(example.text) + ([self._end] if self._end is not None else [])
        return self._checked_row(example.id, ids, [0.0] + [1.0] * (len(ids) - 1))

    def chat(self, example: Chat) -> Encoded:
        """A conversation: what the assistant says is learned, with the token that ends its turn.

        Raises DataError, beginning with the example's id: nothing to learn, too long, a turn without an end, two BOS; and
        ModelError for a template that ends no turn.
        """
        if self.template is not None and self.template.name == "raw":
            return self.pair(_as_pair(example))
        whole, spans = self._place(example.id, example.messages, example.tools, self.learn)
        row = self._spanned(example.id, whole, spans)
        first = next(at for at, message in enumerate(example.messages) if message.role == "assistant")
        if first:
            self._compare_prompt(row, lambda: self.render(example.messages[:first], example.tools, opened=True)[1])
        return row

    def pair(self, example: Pair) -> Encoded:
        """A source and its target: both sides of an encoder-decoder; for a decoder one question and one answer."""
        if self.kind == "encoder-decoder":
            source = self._framed(example.source)
            with_target = self.tokenizer(text_target=example.target, verbose=False)["input_ids"]
            target = list(with_target)
            if self._end is not None and (not target or target[-1] != self._end):
                target.append(self._end)
            ids, _, cut = self._fit(source, [0.0] * len(source), example.id, keep_last=True)
            target_ids, weights, more = self._fit(target, [1.0] * len(target), example.id, keep_last=True)
            return Encoded(example.id, ids, target=target_ids, target_weights=weights, cut=cut + more)
        if self.template is not None and self.template.name != "raw":
            turns = (Message("user", example.source), Message("assistant", example.target))
            return self.chat(Chat(example.id, turns, meta=example.meta))
        if self._end is None:
            raise ModelError("the tokenizer has no end-of-text token, so the model could not learn to stop")
        whole = example.source + example.target + self.tokenizer.eos_token
        row = self._spanned(example.id, whole, [(len(example.source), len(whole), 1.0)])
        self._compare_prompt(row, lambda: (*self._first, *self._controls.ids(example.source)))
        return row

    def labelled(self, text: str, pair: str | None = None, id: str = "") -> Encoded:
        """A text, or two, as a classifier or regressor reads it: the tokenizer's own frame, or for a decoder the texts
        on two lines with the end-of-text token after them."""
        lost = 0
        if self.kind == "decoder":
            whole = text if pair is None else f"{text}\n{pair}"
            ids = self._first + self._controls.ids(whole) + ([self._end] if self._end is not None else [])
        else:
            ids = self._framed(text, pair)
            if pair is not None and self.truncate and len(ids) > self.max_length:
                # Both texts lose their ends, not the second alone.
                lost = len(ids) - self.max_length
                ids = self._framed(text, pair, truncation=True, max_length=self.max_length)
        fitted, _, cut = self._fit(ids, [0.0] * len(ids), id, keep_last=True)
        return Encoded(id, fitted, cut=lost + cut)

    def framed_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a text alone as the tokenizer frames it, however long."""
        return tuple(self._framed(text))

    def framed(self, text: str, id: str = "") -> Encoded:
        """A text alone as the tokenizer frames it, to make a vector of. Raises DataError for one without a token."""
        ids = self._framed(text)
        if not ids:
            raise DataError(f"{id}: the text is empty, and this tokenizer puts nothing around it; give some text")
        fitted, _, cut = self._fit(ids, [0.0] * len(ids), id, keep_last=True)
        return Encoded(id, fitted, cut=cut)

    # -- to go on from ------------------------------------------------------------------------------------------------

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, opened: bool = False
    ) -> tuple[str, tuple[int, ...]]:
        """A conversation as the template's text and as ids, however long; `opened` for the assistant's next turn.

        Raises DataError when the template refuses the turns.
        """
        text = self._apply(messages, tools, opened)
        return text.replace(MARK, ""), tuple(self._with_first(self._controls.ids(text)))

    def split(self, messages: Sequence[Message], id: str = "") -> tuple[str, str]:
        """A conversation's text before what the assistant says last, and that with the end of its turn, as `tokens` takes it.

        Raises DataError and ModelError as `chat` does.
        """
        whole, spans = self._place(id, messages, (), "last")
        start, end, _ = spans[-1]
        return whole[:start], whole[start:end]

    def tokens(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of a rendered text, and for each how many characters it reaches to."""
        ids, offsets = self._controls.placed(text)
        ends = [end for _, end in offsets]
        framed = self._with_first(ids)
        return tuple(framed), (*(0,) * (len(framed) - len(ids)), *ends)

    def guarded_text(self, text: str) -> str:
        """A text of somebody else's for `tokens`, in which no control token is one."""
        return self._controls.guard(text)[0]

    def shorten(self, text: str, count: int) -> str:
        """A text without its last `count` tokens."""
        kept = self._controls.placed(text)[1][:-count]
        # Tokens of one character reach to the same place, so that its last ones alone cut nothing.
        return text[: min(kept[-1][1], len(text) - 1)] if kept else ""

    def prompt(
        self, prompt: str | Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, raw: bool = False
    ) -> tuple[int, ...]:
        """The ids to generate from. A text is one user turn where there is a chat template, unless `raw`.

        Raises DataError when they leave no room in the context.
        """
        if self.kind != "decoder":
            text = prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)
            ids = self._framed(text)
        elif raw or self.template is None or self.template.name == "raw":
            text = prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)
            ids = self._first + self._controls.ids(text)
        else:
            turns = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
            ids = list(self.render(turns, tools, opened=True)[1])
        if len(ids) > self.max_length or (self.kind == "decoder" and len(ids) == self.max_length):
            raise DataError(f"the prompt has {len(ids)} tokens, and the context is {self.max_length}; shorten it")
        if not ids:
            raise DataError("the prompt is empty, and this model has no token to start from; give some text")
        return tuple(ids)

    def decode(self, ids: Sequence[int], shown: Sequence[int] = ()) -> str:
        """Ids back to text, special tokens left out but for those that are to be `shown`."""
        if shown:
            special = set(self.tokenizer.all_special_ids)
            special |= {id for id, one in self.tokenizer.added_tokens_decoder.items() if one.special}
            kept = [one for one in ids if one in shown or one not in special]
            return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def describe(self, row: Encoded) -> list[tuple[str, float]]:
        """(text, weight) of each token, to be shown; what is not yet a whole character shows up with its last byte."""
        weights = row.weights or (0.0,) * len(row.ids)
        return self._pieces(row.ids, weights) + self._pieces(row.target, row.target_weights)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _said(self, message: Message) -> dict[str, Any]:
        """A turn as templates take it. What users and tools say controls nothing."""
        turn = _as_dict(message)
        if message.role in ("user", "tool"):
            turn["content"], count = self._controls.guard(message.content)
            self.guarded += count
        return turn

    def _framed(self, text: str, pair: str | None = None, **limits: Any) -> list[int]:
        return list(self.tokenizer(text, pair, verbose=False, **limits)["input_ids"])

    def _apply(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], opened: bool) -> str:
        assert self.template is not None
        turns = [self._said(message) for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=list(tools) or None,
                chat_template=self.template.source,
                tokenize=False,
                add_generation_prompt=opened,
            )
        except Exception as err:  # jinja2's errors, and whatever a template's own code runs into
            roles = " ".join(message.role for message in messages) or "nothing"
            why = str(err).splitlines()[0] if str(err) else type(err).__name__
            raise DataError(
                f"the chat template {self.template.name!r} cannot render these turns ({roles}): {why}"
            ) from None
        return str(text)

    def _place(
        self, id: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]], learn: str
    ) -> tuple[str, list[Span]]:
        """A conversation's text, and what of it the assistant says."""
        if self.template is None:
            raise ModelError("this model was loaded without a chat template, so it cannot read conversations")
        if self.turn_end is None:
            raise ModelError(
                f"the chat template {self.template.name!r} ends an assistant's turn with {self._tail!r}, "
                "which is no special token: the model could not learn to stop; use another template"
            )
        apply = lambda some, opened: self._apply(some, tools, opened)  # noqa: E731
        try:
            return self._apply(messages, tools, False), find_spans(messages, apply, self.turn_end, learn)
        except DataError as err:
            raise DataError(f"{id}: {err}") from None

    def _find_turn_end(self) -> str | None:
        """The text of the special token that the template writes after an assistant's content; None where there is none."""
        text = self._apply([Message("user", "a"), Message("assistant", SENTINEL)], (), False)
        self._tail = text.partition(SENTINEL)[2]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        found = next((token for token in self._controls.ids(self._tail) if token in special), None)
        return None if found is None else str(self.tokenizer.convert_ids_to_tokens(found))

    def _with_first(self, ids: list[int]) -> list[int]:
        """Put the tokenizer's own first tokens (BOS) in front of a rendered chat, unless the template wrote them."""
        count = len(self._first)
        return ids if not count or ids[:count] == self._first else self._first + ids

    def _spanned(self, id: str, whole: str, spans: Sequence[Span]) -> Encoded:
        """Tokens of `whole`, each weighing as the span it lies in; a token across the edge of a span is context."""
        ids, offsets = self._controls.placed(whole)
        weights = [0.0] * len(ids)
        for start, end, weight in spans:
            for at, (first, last) in enumerate(offsets):
                if start <= first < last <= end:
                    weights[at] = weight
        framed = self._with_first(ids)
        weights = [0.0] * (len(framed) - len(ids)) + weights
        if self._first and framed[1 : 1 + len(self._first)] == self._first and len(framed) > 1:
            token = self.tokenizer.convert_ids_to_tokens(self._first[0])
            raise DataError(
                f"{id}: the text begins with {token} twice, once from the chat template and once more; take one out"
            )
        return self._checked_row(id, framed, weights)

    def _checked_row(self, id: str, ids: list[int], weights: list[float]) -> Encoded:
        if weights:
            weights[0] = 0.0  # nothing comes before the first token, so nothing can predict it
        if not any(weights):
            raise DataError(f"{id}: there is nothing to learn in this row: no assistant turn with content, or no text")
        if not any(weight and token in self.stop_ids for token, weight in zip(ids, weights)):
            raise DataError(f"{id}: no token that ends the answer is learned, so the model would never stop")
        fitted, kept, cut = self._fit(ids, weights, id)
        if cut and not any(kept):
            raise DataError(
                f"{id}: cut to {self.max_length} tokens, nothing to learn is left; raise max_length or shorten the prompt"
            )
        return Encoded(id, fitted, kept, cut=cut)

    def _fit(
        self, ids: list[int], weights: list[float], id: str, *, keep_last: bool = False
    ) -> tuple[tuple[int, ...], tuple[float, ...], int]:
        """At most max_length tokens: (ids, weights, how many were cut). `keep_last` keeps the frame's last token."""
        over = len(ids) - self.max_length
        if over <= 0:
            return tuple(ids), tuple(weights), 0
        if not self.truncate:
            raise DataError(
                f"{id}: {len(ids)} tokens do not fit in {self.max_length}; shorten the text, raise max_length if the model "
                "allows it, or set truncate: true to cut (the cuts are counted)"
            )
        if keep_last:
            return (*ids[: self.max_length - 1], ids[-1]), (*weights[: self.max_length - 1], weights[-1]), over
        return tuple(ids[: self.max_length]), tuple(weights[: self.max_length]), over

    def _compare_prompt(self, row: Encoded, render: Callable[[], tuple[int, ...]]) -> None:
        """Count it when the prompt alone tokenises otherwise than as the beginning of the whole."""
        if self._checked >= CHECKED:
            return
        self._checked += 1
        alone = render()
        if row.ids[: len(alone)] != alone[: len(row.ids)]:
            self.mismatches += 1

    def _pieces(self, ids: Sequence[int], weights: Sequence[float]) -> list[tuple[str, float]]:
        def decode(part: Sequence[int]) -> str:
            return str(self.tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

        pieces: list[tuple[str, float]] = []
        # Each is decoded with the piece before it: alone, a word of SentencePiece would lose the space in front.
        start = done = 0
        for at, weight in enumerate(weights[: len(ids)], 1):
            before, text = decode(ids[start:done]), decode(ids[start:at])
            whole = not text.endswith("\ufffd")
            pieces.append((text[len(before) :] if whole else "", weight))
            if whole:
                start, done = done, at
        return pieces


def _as_dict(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _as_pair(example: Chat) -> Pair:
    if len(example.messages) != 2 or example.messages[1].role != "assistant":
        raise DataError(
            f"{example.id}: the raw template joins one prompt and one answer; this conversation has other turns"
        )
    return Pair(example.id, example.messages[0].content, example.messages[1].content, example.meta)
