"""Calls of tools in what a model writes: the form that its template gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from luthier.core.errors import DataError
from luthier.core.types import Message
from luthier.text.render import Renderer

# What no template writes by itself.
TEXT, NAME, KEY, VALUE, NUMBER = "luthier-text", "luthier-name", "luthier-key", "luthier-value", "luthier09"
OTHER, SECOND, NESTED = "luthier-other", "luthier-second", {"luthier-in": [1, "luthier-deep"]}
# What a name is made of; what follows it begins otherwise.
NAMES = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True)
class CallForm:
    """How calls stand in an answer: `before`, then the calls, `between` two of them, and `after` the last. An answer without
    a text begins with `opening`. A call is, by its `kind`,

    - "object": a JSON object of its name and its arguments, which have the key `arguments`;
    - "named": its name, the text `joined[0]`, and a JSON object of its arguments, as in later models of Mistral;
    - "marked": its name, and each argument between marks, texts as they are and all else as JSON, as in Qwen3-Coder. `joined`
      is what stands between the name and the first key, a key and its value, a value and the next key, behind the last value,
      and behind the name of a call without arguments, empty where there can be none.

    `marks` are the special tokens in these, each with its id; `numbered`, a call has an id of nine letters and digits: an
    object holds it behind its arguments, and a named call between `joined[0]` and `joined[1]`."""

    before: str
    between: str
    after: str
    arguments: str
    opening: str
    marks: tuple[tuple[str, int], ...] = ()
    numbered: bool = False
    kind: Literal["object", "named", "marked"] = "object"
    joined: tuple[str, ...] = ()

    @property
    def close(self) -> str:
        """What stands behind every value of a marked call, up to a special token that stands behind some of them."""
        following, last = self.joined[2:4]
        size = len(shared(following, last))
        for spelled in (one for one, _ in self.marks):
            starts = (found.start() for text in (following, last) for found in re.finditer(re.escape(spelled), text))
            size = min([size, *(start for start in starts if start < size < start + len(spelled))])
        return following[:size]


@dataclass(frozen=True, slots=True)
class Place:
    """A call of the probe in a text; `arguments` is None where they are not as they were given."""

    start: int
    end: int
    arguments: str | None = ""
    joined: tuple[str, ...] = ()
    numbered: bool = False


def find_form(renderer: Renderer) -> CallForm | None:
    """The form in which a template writes calls; None where it writes none, or in a way that cannot be read again."""
    if renderer.template is None or renderer.template.name == "raw" or not renderer.turn_end:
        return None
    asked = Message("user", "u")

    def write(text: str, *arguments: dict[str, Any]) -> str:
        calls = ({"id": NUMBER, "type": "function", "function": {"name": NAME, "arguments": one}} for one in arguments)
        return renderer.render((asked, Message("assistant", text, tuple(calls))))[0]

    try:
        given = {KEY: VALUE}
        one, two, bare = write(TEXT, given), write(TEXT, given, given), write("", given)
        prompt = renderer.render((asked,), opened=True)[0]
    except DataError:
        return None
    kinds: tuple[tuple[Literal["object", "named", "marked"], Callable[[str], list[Place]]], ...]
    kinds = ("object", _objects), ("named", _named), ("marked", _marked)
    places = {kind: (find(one), find(two), find(bare)) for kind, find in kinds}
    kind = next((kind for kind, found in places.items() if [len(each) for each in found] == [1, 2, 1]), None)
    if kind is None or TEXT not in one:
        return None
    found, first, alone = places[kind]
    opening = bare[len(prompt) : alone[0].start] if bare.startswith(prompt) else None
    (place,) = found
    before = one[one.index(TEXT) + len(TEXT) : place.start]
    after, ended, _ = one[place.end :].partition(renderer.turn_end)
    if not ended or place.arguments is None:
        return None
    if opening is None or opening.lstrip("\n") != before.lstrip("\n"):
        opening = before.lstrip("\n")
    between = two[first[0].end : first[1].start]
    form: CallForm | None = CallForm(
        before, between, after, place.arguments, opening, (), place.numbered, kind, place.joined
    )
    if kind != "object" and not before.strip():
        # Nothing tells a name from a word.
        return None
    if kind == "marked" and form is not None:
        form = _with_values(form, renderer.turn_end, write)
    if form is None or NUMBER in (fixed := "".join((before, form.between, form.after, opening, *form.joined))):
        return None
    form = replace(form, marks=_marks(renderer, fixed))
    return None if kind == "marked" and not form.close.strip() else form


def _marks(renderer: Renderer, text: str) -> tuple[tuple[str, int], ...]:
    """The special tokens that a text spells: those that are left out of answers unless they are asked for."""
    tokenizer = renderer.tokenizer
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    return tuple((spelled, id) for id, spelled in sorted(special.items()) if spelled in text)


def _objects(text: str) -> list[Place]:
    """JSON objects that are calls of the probe."""
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
            found.append(Place(at, at + length, key if value[key] == {KEY: VALUE} else None, (), numbered))
            at += length
        else:
            at += 1
    return found


def _named(text: str) -> list[Place]:
    """Names with the probe's arguments behind them as a JSON object."""
    found: list[Place] = []
    for name in re.finditer(NAME, text):
        at = text.find("{", name.end())
        try:
            value, length = json.JSONDecoder().raw_decode(text[at:]) if at >= 0 else (None, 0)
        except json.JSONDecodeError:
            continue
        joined = text[name.end() : at].split(NUMBER)
        if value == {KEY: VALUE} and NAME not in text[name.end() : at] and len(joined) <= 2 and _ends_names(joined[0]):
            found.append(Place(name.start(), at + length, "", tuple(joined), len(joined) == 2))
    return found


def _marked(text: str) -> list[Place]:
    """Names with a key and a value of the probe behind them, whatever stands between; each ends with its value."""
    shape = re.compile(f"{NAME}((?:(?!{NAME}).)*?){KEY}((?:(?!{NAME}).)*?){VALUE}", re.DOTALL)
    return [Place(one.start(), one.end(), "", (one[1], one[2])) for one in shape.finditer(text)]


def _with_values(form: CallForm, turn_end: str, write: Callable[..., str]) -> CallForm | None:
    """A form of marked calls with all that stands around their values; None where these could not be told from it."""
    first, middle = form.joined
    last = shared(form.after, form.between)
    try:
        one, number, nested = (write(TEXT, {KEY: value}) for value in (VALUE, 70417, NESTED))
        two = write(TEXT, {KEY: VALUE, OTHER: SECOND})
    except DataError:
        return None
    head, tail = one.split(VALUE)
    following = re.fullmatch(
        f"{re.escape(head + VALUE)}(.*){re.escape(OTHER + middle + SECOND + tail)}", two, re.DOTALL
    )
    if number != f"{head}70417{tail}" or following is None or not _is_json(nested, head, tail):
        return None
    try:
        empty = write(TEXT, {}).removeprefix(one[: one.index(NAME) + len(NAME)]).partition(turn_end)[0]
    except DataError:
        empty = ""
    after = form.after.removeprefix(last)
    none = empty.removesuffix(after) if empty.endswith(after) and _ends_names(empty) else ""
    joined = (first, middle, following[1], last, none)
    made = replace(form, between=form.between.removeprefix(last), after=after, joined=joined)
    ends = following[1], last
    apart = not any(overlap(one, other) for one in ends for other in ends)
    apart = apart and ends[0] not in ends[1] and ends[1] not in ends[0]
    good = apart and _ends_names(first) and not (none and _begins(first, none)) and middle
    return made if good else None


def _is_json(text: str, head: str, tail: str) -> bool:
    """Whether the nested value stands in a text as JSON."""
    try:
        return bool(json.loads(text.removeprefix(head).removesuffix(tail)) == NESTED)
    except ValueError:
        return False


def _ends_names(text: str) -> bool:
    return bool(text) and not NAMES.match(text)


def _begins(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def shared(one: str, other: str) -> str:
    """How two texts begin both."""
    return one[: next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))]


def overlap(text: str, marker: str) -> int:
    """How long an end of `text` is a beginning of `marker`, and not all of it."""
    most = min(len(text), len(marker) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(marker[:size])), 0)
