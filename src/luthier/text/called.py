"""Reading calls of tools in what a model writes, as it comes."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luthier.text.calls import NAMES, CallForm, overlap
from luthier.text.values import KINDS, kinds_of_tools, read_value

BLANKS = " \n\t\r"
LETTERS = string.ascii_letters + string.digits
NUMBER = re.compile(r"-?[0-9.eE+-]*?([0-9]*)")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer: of its text, or of the call `index`: first its name, then its arguments piece by piece."""

    kind: Literal["text", "name", "arguments"]
    text: str
    index: int = 0


class CallReader:
    """Takes an answer in pieces, however it is cut, and gives the parts that are sure; put together they are always the same.

    What begins like a call and turns out to be none is text. What is cut off inside a call's arguments stays a call, with
    what there is of them. `tools` (OpenAI's objects) say which arguments are texts where the form writes these without
    quotes; an argument of which they say nothing is what its JSON is, and a text where it is none.
    """

    def __init__(self, form: CallForm, tools: Sequence[Mapping[str, Any]] = ()):
        self._form = form
        self._kinds = kinds_of_tools(tools) if form.kind == "marked" else {}
        self._held = ""
        self._state: Literal["text", "head", "arguments", "key", "value", "tail", "over"] = "text"
        self._start = True
        self._taken = ""
        self._depth, self._quoted, self._escaped = 0, False, False
        self._name, self._first, self._value = "", True, KINDS
        self.calls = 0
        """How many calls have begun."""
        self.digits = 0
        """How many digits stand, one after the other, at the end of what was fed, inside of a call and outside of texts."""

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
            elif state == "key":
                yield from self._key()
            elif state == "value":
                yield from self._written(last)
            elif state == "tail":
                yield from self._tail(last)
            else:
                # Behind the calls nothing is said.
                self._held = ""
            if self._state not in ("arguments", "value"):
                self.digits = 0
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
        kept = 0 if last else overlap(self._held, marker)
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        if text:
            self._start = False
            yield Part("text", text)

    def _could_begin(self, marker: str) -> bool:
        return bool(marker) and (self._held.startswith(marker) or marker.startswith(self._held))

    def _head(self, last: bool) -> Iterator[Part]:
        """A call up to its arguments."""
        found = _read_object(self._held, self._form.arguments) if self._form.kind == "object" else self._read_name()
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
        self._name, length = found
        rest = self._held[:length]
        self._held, self._state = self._held[length:], "arguments"
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls += 1
        yield Part("name", self._name, self.calls - 1)
        if self._form.kind != "marked":
            return
        self._state, self._first = "key", True
        if not rest.endswith(self._form.joined[0]):
            self._state = "tail"
            yield Part("arguments", "{}", self.calls - 1)

    def _read_name(self) -> tuple[str, int] | tuple[()] | None:
        """A name and what stands behind it, as `_read_object`."""
        name = NAMES.match(self._held)
        if name is None or name.end() == len(self._held):
            return () if name is None and self._held else None
        rest = self._held[name.end() :]
        joined = self._form.joined
        if self._form.kind == "marked":
            for one in (joined[0], joined[4]):
                if one and rest.startswith(one):
                    return name[0], name.end() + len(one)
            return None if any(one.startswith(rest) for one in (joined[0], joined[4])) else ()
        at = 0
        for number, one in enumerate(joined):
            if number:
                at += len(rest[at:]) - len(rest[at:].lstrip(LETTERS))
            if not rest.startswith(one, at):
                return None if one.startswith(rest[at:]) else ()
            at += len(one)
        at += len(rest[at:]) - len(rest[at:].lstrip(BLANKS))
        if at == len(rest):
            return None
        return (name[0], name.end() + at) if rest[at] == "{" else ()

    def _arguments(self) -> Iterator[Part]:
        for at, letter in enumerate(self._held):
            self._see(letter)
            if self._depth == 0 and not self._quoted and letter in "}]":
                text, self._held, self._state = self._held[: at + 1], self._held[at + 1 :], "tail"
                self._taken = "}"
                yield Part("arguments", text, self.calls - 1)
                return
        text, self._held = self._held, ""
        if text:
            yield Part("arguments", text, self.calls - 1)

    def _see(self, letter: str) -> None:
        """Go on in JSON by a letter."""
        self.digits = self.digits + 1 if not self._quoted and "0" <= letter <= "9" else 0
        if self._escaped:
            self._escaped = False
        elif letter == "\\" and self._quoted:
            self._escaped = True
        elif letter == '"':
            self._quoted = not self._quoted
        elif not self._quoted:
            self._depth += (letter in "{[") - (letter in "}]")

    def _key(self) -> Iterator[Part]:
        """The name of an argument."""
        key, middle, rest = self._held.partition(self._form.joined[1])
        if not middle:
            return
        self._value = self._kinds.get(self._name, {}).get(key, KINDS)
        self._held, self._state, self._quoted = rest, "value", False
        self._escaped = False
        begun = "{" if self._first else ", "
        self._first = False
        quote = '"' if self._value == {"string"} else ""
        yield Part("arguments", f"{begun}{json.dumps(key, ensure_ascii=False)}: {quote}", self.calls - 1)

    def _written(self, last: bool) -> Iterator[Part]:
        """A value, up to the marks behind it: JSON, a text, or what is known to be one of them when it is whole."""
        following, ending = self._form.joined[2:4]
        if "string" not in self._value:
            length, found = self._see_value(last)
        else:
            places = [(at, one) for one in (following, ending) if (at := self._held.find(one)) >= 0]
            length, found = min(places, default=(len(self._held), ""))
            if not found and not last:
                length -= max(overlap(self._held, following), overlap(self._held, ending))
        whole, text = bool(found) or last, self._held[:length]
        if self._value == {"string"}:
            said = json.dumps(text, ensure_ascii=False)[1:-1] + ('"' if found else "")
        elif "string" not in self._value:
            said = text
        else:
            said = read_value(text, self._value) if whole else ""
            number = NUMBER.fullmatch(text) if "integer" in self._value else None
            self.digits = len(number[1]) if number is not None else 0
            length = length if whole else 0
        self._held = self._held[length + len(found) :]
        if found:
            self._state = "key" if found == following else "tail"
            said += "}" if found == ending else ""
        if said:
            yield Part("arguments", said, self.calls - 1)

    def _see_value(self, last: bool) -> tuple[int, str]:
        """How much of what is held belongs to JSON for sure, and the marks behind it where they are there."""
        ends = self._form.joined[2:4]
        for at, letter in enumerate(self._held):
            if not self._quoted:
                found = next((one for one in ends if self._held.startswith(one, at)), "")
                rest = self._held[at : at + max(map(len, ends))]
                if found or (not last and any(one.startswith(rest) for one in ends)):
                    return at, found
            self._see(letter)
        return len(self._held), ""

    def _tail(self, last: bool) -> Iterator[Part]:
        """The end of a call, and whether another follows."""
        bare = self._held.lstrip()
        kind = self._form.kind
        if self._form.numbered and kind == "object" and not bare.startswith("}"):
            # What the id is nobody is told: there are new ones.
            bare = bare[bare.find("}") :] if "}" in bare else ""
            if not bare and not last:
                return
        whole = "}" + self._form.between if kind == "object" else self._form.between.lstrip()
        rest = bare[len(whole) :].lstrip()
        if whole and bare.startswith(whole) and (rest.startswith("{") if kind == "object" else NAMES.match(rest)):
            self._taken, self._held, self._state = "", rest, "head"
        elif last or not (whole.startswith(bare) or (not rest and bare.startswith(whole))):
            self._state = "over"
        yield from ()


def _read_object(text: str, key: str) -> tuple[str, int] | tuple[()] | None:
    """The name of a call, and the length of the object up to the beginning of its arguments; None while that is open, and
    nothing where it is no such object."""
    at = 0
    name = ""
    # An empty one stands for the name itself.
    for want in ("{", '"name"', ":", "", ",", json.dumps(key), ":"):
        while at < len(text) and text[at] in BLANKS:
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
    while at < len(text) and text[at] in BLANKS:
        at += 1
    if at == len(text):
        return None
    return (name, at) if text[at] in "{[" else ()


def _joined(parts: Iterator[Part]) -> list[Part]:
    found: list[Part] = []
    for part in parts:
        if found and found[-1].kind == part.kind != "name" and found[-1].index == part.index:
            found[-1] = Part(part.kind, found[-1].text + part.text, part.index)
        else:
            found.append(part)
    return found


def read_calls(
    form: CallForm | None, text: str, tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[str, list[dict[str, Any]]]:
    """A whole answer as its text and its calls, each with a `name` and the JSON text of its `arguments`."""
    if form is None:
        return text, []
    reader = CallReader(form, tools)
    said, calls = "", list[dict[str, Any]]()
    for part in [*reader.feed(text), *reader.end()]:
        if part.kind == "text":
            said += part.text
        elif part.kind == "name":
            calls.append({"name": part.text, "arguments": ""})
        else:
            calls[part.index]["arguments"] += part.text
    return said, calls
