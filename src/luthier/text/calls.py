"""Calls of tools in what a model writes: the form that its template gives them, and reading them as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from luthier.core.errors import DataError
from luthier.core.types import Message
from luthier.text.render import Renderer

# What no template writes by itself.
TEXT, NAME, KEY, VALUE, NUMBER = "luthier-text", "luthier-name", "luthier-key", "luthier-value", "luthier09"


@dataclass(frozen=True, slots=True)
class CallForm:
    """How calls stand in an answer: `before`, then for each call a JSON object of its name and its arguments (under the key
    `arguments`), `between` two of them, and `after` the last. An answer without a text begins with `opening`.

    `marks` are the special tokens in these, each with its id; `numbered`, the object holds an `id` of nine letters and digits
    behind the arguments, as Mistral's do."""

    before: str
    between: str
    after: str
    arguments: str
    opening: str
    marks: tuple[tuple[str, int], ...] = ()
    numbered: bool = False


def find_form(renderer: Renderer) -> CallForm | None:
    """The form in which a template writes calls; None where it writes none, or not as JSON objects with the name first."""
    if renderer.template is None or renderer.template.name == "raw" or not renderer.turn_end:
        return None
    call = {"id": NUMBER, "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
    answers = [Message("assistant", text, (call,) * count) for text, count in ((TEXT, 1), (TEXT, 2), ("", 1))]
    asked = Message("user", "u")
    try:
        one, two, bare = (renderer.render((asked, answer))[0] for answer in answers)
        prompt = renderer.render((asked,), opened=True)[0]
    except DataError:
        return None
    found, first, alone = _objects(one), _objects(two), _objects(bare)
    if len(found) != 1 or len(first) != 2 or len(alone) != 1 or TEXT not in one:
        return None
    opening = bare[len(prompt) : alone[0][0]] if bare.startswith(prompt) else None
    start, end, key, numbered = found[0]
    before = one[one.index(TEXT) + len(TEXT) : start]
    after, ended, _ = one[end:].partition(renderer.turn_end)
    if not ended or key is None:
        return None
    if opening is None or opening.lstrip("\n") != before.lstrip("\n"):
        opening = before.lstrip("\n")
    between = two[first[0][1] : first[1][0]]
    marks = _marks(renderer, before + between + after + opening)
    return CallForm(before, between, after, key, opening, marks, numbered)


def _marks(renderer: Renderer, text: str) -> tuple[tuple[str, int], ...]:
    """The special tokens that a text spells: those that are left out of answers unless they are asked for."""
    tokenizer = renderer.tokenizer
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    return tuple((spelled, id) for id, spelled in sorted(special.items()) if spelled in text)


def _objects(text: str) -> list[tuple[int, int, str | None, bool]]:
    """(start, end, key of the arguments, whether an id follows) of the JSON objects that are calls of the probe."""
    found, at = [], 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, length = json.JSONDecoder().raw_decode(text[at:])
        except json.JSONDecodeError:
            at += 1
            continue
        numbered = list(value)[2:] == ["id"] and value["id"] == NUMBER
        if list(value)[:1] == ["name"] and value["name"] == NAME and (len(value) == 2 or numbered):
            key = list(value)[1]
            found.append((at, at + length, key if value[key] == {KEY: VALUE} else None, numbered))
            at += length
        else:
            at += 1
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer: of its text, or of the call `index`: first its name, then its arguments piece by piece."""

    kind: Literal["text", "name", "arguments"]
    text: str
    index: int = 0


class CallReader:
    """Takes an answer in pieces, however it is cut, and gives the parts that are sure; put together they are always the same.

    What begins like a call and turns out to be none is text. What is cut off inside a call's arguments stays a call, with
    what there is of them.
    """

    def __init__(self, form: CallForm):
        self._form = form
        self._held = ""
        self._state: Literal["text", "head", "arguments", "tail", "over"] = "text"
        self._start = True
        self._taken = ""
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls = 0
        """How many calls have begun."""

    def feed(self, piece: str) -> list[Part]:
        """The parts that are sure with one more piece."""
        self._held += piece
        return _joined(self._steps(last=False))

    def end(self) -> list[Part]:
        """What was held back, when nothing more comes."""
        return _joined(self._steps(last=True))

    def _steps(self, last: bool) -> Iterator[Part]:
        while self._held or last:
            state, held = self._state, len(self._held)
            if state == "text":
                yield from self._text(last)
            elif state == "head":
                yield from self._head(last)
            elif state == "arguments":
                yield from self._arguments()
            elif state == "tail":
                yield from self._tail(last)
            else:
                # Behind the calls nothing is said.
                self._held = ""
            if not self._held or (self._state == state and len(self._held) == held):
                return

    def _text(self, last: bool) -> Iterator[Part]:
        before = self._form.before
        if not before:
            # Calls stand alone: an answer that begins with an object is one.
            blank = len(self._held) - len(self._held.lstrip())
            if not self._start or (blank < len(self._held) and self._held[blank] != "{"):
                self._start = False
                text, self._held = self._held, ""
                yield Part("text", text)
            elif blank < len(self._held):
                self._taken, self._held, self._state = self._held[:blank], self._held[blank:], "head"
            elif last:
                text, self._held = self._held, ""
                yield Part("text", text)
            return
        marker = before
        # A template that puts a line's end between the text and its calls may leave it out where there is no text.
        if self._start and self._could_begin(before.lstrip("\n")):
            marker = before.lstrip("\n")
        at = self._held.find(marker)
        if at >= 0 and (at == 0 or marker == before):
            if at:
                yield Part("text", self._held[:at])
            self._taken, self._held, self._state = marker, self._held[at + len(marker) :], "head"
            return
        kept = 0 if last else _overlap(self._held, marker)
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        if text:
            self._start = False
            yield Part("text", text)

    def _could_begin(self, marker: str) -> bool:
        return bool(marker) and (self._held.startswith(marker) or marker.startswith(self._held))

    def _head(self, last: bool) -> Iterator[Part]:
        """An object up to its arguments."""
        found = _read_head(self._held, self._form.arguments)
        if found is None and not last:
            return
        if not found:
            # It is none: what was taken for its beginning is text.
            text, self._taken, self._start = self._taken, "", False
            if self.calls:
                self._held, self._state = "", "over"
                return
            if not text:
                text, self._held = self._held[:1], self._held[1:]
            self._state = "text"
            yield Part("text", text)
            return
        name, length = found
        self._held, self._state = self._held[length:], "arguments"
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls += 1
        yield Part("name", name, self.calls - 1)

    def _arguments(self) -> Iterator[Part]:
        for at, letter in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif letter == "\\" and self._quoted:
                self._escaped = True
            elif letter == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += (letter in "{[") - (letter in "}]")
                if self._depth == 0 and letter in "}]":
                    text, self._held, self._state = self._held[: at + 1], self._held[at + 1 :], "tail"
                    self._taken = "}"
                    yield Part("arguments", text, self.calls - 1)
                    return
        text, self._held = self._held, ""
        if text:
            yield Part("arguments", text, self.calls - 1)

    def _tail(self, last: bool) -> Iterator[Part]:
        """The end of an object, and whether another follows."""
        bare = self._held.lstrip()
        if self._form.numbered and not bare.startswith("}"):
            # What the id is nobody is told: there are new ones.
            bare = bare[bare.find("}") :] if "}" in bare else ""
            if not bare and not last:
                return
        whole = "}" + self._form.between
        if bare.startswith(whole) and bare[len(whole) :].lstrip().startswith("{"):
            self._taken, self._held, self._state = "", bare[len(whole) :].lstrip(), "head"
        elif last or not (whole.startswith(bare) or (not bare[len(whole) :].strip() and bare.startswith(whole))):
            self._state = "over"
        yield from ()


def _read_head(text: str, key: str) -> tuple[str, int] | tuple[()] | None:
    """The name of a call, and the length of the object up to the beginning of its arguments; None while that is open, and
    nothing where it is no such object."""
    at = 0
    name = ""
    # An empty one stands for the name itself.
    for want in ("{", '"name"', ":", "", ",", json.dumps(key), ":"):
        while at < len(text) and text[at] in " \n\t\r":
            at += 1
        rest = text[at:]
        if not want:
            try:
                value, length = json.JSONDecoder().raw_decode(rest)
            except json.JSONDecodeError:
                return None if not rest or (rest[0] == '"' and '"' not in rest[1:].replace('\\"', "")) else ()
            if not isinstance(value, str):
                return ()
            name, at = value, at + length
            continue
        if not rest.startswith(want):
            return None if want.startswith(rest) else ()
        at += len(want)
    while at < len(text) and text[at] in " \n\t\r":
        at += 1
    if at == len(text):
        return None
    return (name, at) if text[at] in "{[" else ()


def _overlap(text: str, marker: str) -> int:
    """How long an end of `text` is a beginning of `marker`."""
    most = min(len(text), len(marker) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(marker[:size])), 0)


def _joined(parts: Iterator[Part]) -> list[Part]:
    found: list[Part] = []
    for part in parts:
        if found and found[-1].kind == part.kind != "name" and found[-1].index == part.index:
            found[-1] = Part(part.kind, found[-1].text + part.text, part.index)
        else:
            found.append(part)
    return found


def read_calls(form: CallForm | None, text: str) -> tuple[str, list[dict[str, Any]]]:
    """A whole answer as its text and its calls, each with a `name` and the JSON text of its `arguments`."""
    if form is None:
        return text, []
    reader = CallReader(form)
    said, calls = "", list[dict[str, Any]]()
    for part in [*reader.feed(text), *reader.end()]:
        if part.kind == "text":
            said += part.text
        elif part.kind == "name":
            calls.append({"name": part.text, "arguments": ""})
        else:
            calls[part.index]["arguments"] += part.text
    return said, calls
