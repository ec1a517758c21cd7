"""A few fixed texts as a model reads them: kept beside the model, so that who loads it sees whether it still reads them so."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from luthier.core.config import Config
from luthier.core.errors import DataError, ModelError
from luthier.core.types import Message, Pair, Role
from luthier.text.render import Renderer
from luthier.text.template import Template

GOLDEN_FILE = "golden.json"
# Nobody's data: both scripts, digits, accents, two spaces, an emoji, and what normalisation likes to change.
TEXT = "The naïve café costs 3.50 € —  don’t pay 12,345!\n这家“咖啡馆”只要３元，很便宜。🙂"
OTHER = "Prices in 2026: one, two, three.\n价格：一、二、三；共六元。"
TURNS: tuple[tuple[Role, str], ...] = (
    ("system", "Answer briefly.\n请简短回答。"),
    ("user", TEXT),
    ("assistant", OTHER),
    ("user", "Thank you! 谢谢！"),
    ("assistant", "You are welcome. 不客气。"),
)
# Templates that write the date read it from a function, which a macro of the same name stands in for.
NO_DATE = "{%- macro strftime_now(format) -%}2000-01-01{%- endmacro -%}"
# Padding is no part of what a model reads.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Sample(Config):
    """A fixed text or conversation, and how it is rendered."""

    form: Literal["text", "pair", "answer", "conversation", "prompt"]
    """What it is: one text, two texts, a target after its source, a whole conversation, one that the assistant goes on with."""
    given: tuple[tuple[str, str], ...]
    """(role, content) of each part."""
    text: str
    """What the template writes, or the ids as text where there is none."""
    ids: tuple[int, ...]
    """Its tokens."""


class Golden(Config):
    """How a model reads fixed texts. Holds nothing of any training data."""

    template: str | None
    """SHA-256 of the chat template's source; None for models that read no conversations."""
    special_tokens: dict[str, str]
    """The tokenizer's own tokens, by their names in transformers."""
    stop_ids: tuple[int, ...]
    """Tokens that end a text."""
    samples: tuple[Sample, ...]
    """The fixed texts; those that the template refuses are left out, the system message first."""


def make_golden(renderer: Renderer) -> Golden:
    """How `renderer` reads the fixed texts; neither the longest row allowed nor today's date changes it."""
    still = stand_still(renderer)
    found = [_render(still, "text", (("text", TEXT),)), _render(still, "pair", (("text", TEXT), ("pair", OTHER)))]
    if renderer.kind == "encoder-decoder" or (renderer.template is not None and renderer.template.name == "raw"):
        found.append(_render(still, "answer", (("source", TEXT), ("target", OTHER))))
    elif renderer.template is not None:
        turns = next((turns for turns in (TURNS, TURNS[1:], TURNS[1:3]) if _accepts(still, turns)), ())
        if turns:
            found += [_render(still, "conversation", turns), _render(still, "prompt", turns[:-1])]
    return _describe(renderer, tuple(found))


def render_again(renderer: Renderer, golden: Golden) -> Golden:
    """How `renderer` reads the texts that stand in `golden`. Raises DataError where its template refuses one."""
    still = stand_still(renderer)
    return _describe(renderer, tuple(_render(still, sample.form, sample.given) for sample in golden.samples))


def find_difference(now: Golden, then: Golden) -> str | None:
    """What of `now` is not as it was `then`, the cause before its effects; None where nothing is."""
    if now.template != then.template:
        return "its chat template is another one" + _where_texts_part(now, then)
    for name in NAMES:
        token, before = now.special_tokens.get(name), then.special_tokens.get(name)
        if token != before:
            return f"{name} is {token!r} and was {before!r}"
    if now.stop_ids != then.stop_ids:
        return f"a text ends with the tokens {list(now.stop_ids)} and ended with {list(then.stop_ids)}"
    for mine, theirs in zip(now.samples, then.samples):
        if mine.ids != theirs.ids:
            at = _first_difference(mine.ids, theirs.ids)
            one, other = (list(ids[at : at + 3]) for ids in (mine.ids, theirs.ids))
            return f"from token {at + 1} of a fixed text on it reads {one} instead of {other}"
    return None


def write_golden(renderer: Renderer, directory: Path) -> None:
    """Keep how `renderer` reads the fixed texts in `directory`."""
    (directory / GOLDEN_FILE).write_text(make_golden(renderer).model_dump_json(indent=2), encoding="utf-8")


def read_golden(directory: Path) -> Golden | None:
    """What was kept in `directory`; None where nothing was. Raises ModelError when it cannot be understood."""
    path = directory / GOLDEN_FILE
    if not path.is_file():
        return None
    try:
        return Golden.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as err:
        raise ModelError(
            f"{path}: cannot be read as a record of how the model reads text ({type(err).__name__}); bring it back, or "
            "remove it to use the model unchecked"
        ) from None


def stand_still(renderer: Renderer) -> Renderer:
    """A copy that renders rows of any length, and the same on every day."""
    still = copy.copy(renderer)
    still.max_length, still.truncate = 1 << 30, False
    template = renderer.template
    if template is not None and "strftime_now" in template.source:
        still.template = Template(template.name, NO_DATE + template.source)
    return still


def _render(still: Renderer, form: str, given: tuple[tuple[str, str], ...]) -> Sample:
    if form in ("conversation", "prompt"):
        text, ids = still.render(_messages(given), opened=form == "prompt")
    else:
        first, *more = (content for _, content in given)
        if form == "answer":
            row = still.pair(Pair(GOLDEN_FILE, first, more[0]))
            ids = row.target or row.ids
        else:
            ids = still.labelled(first, *more).ids
        text = str(still.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return Sample(form=form, given=given, text=text, ids=ids)


def _accepts(still: Renderer, turns: tuple[tuple[Role, str], ...]) -> bool:
    try:
        still.render(_messages(turns))
        still.render(_messages(turns[:-1]), opened=True)
    except DataError:
        return False
    return True


def _messages(given: Iterable[tuple[Any, str]]) -> list[Message]:
    return [Message(role, content) for role, content in given]


def _describe(renderer: Renderer, samples: tuple[Sample, ...]) -> Golden:
    source = None if renderer.template is None else renderer.template.source
    named = renderer.tokenizer.special_tokens_map
    return Golden(
        template=None if source is None else hashlib.sha256(source.encode()).hexdigest(),
        special_tokens={name: str(named[name]) for name in NAMES if named.get(name) is not None},
        stop_ids=renderer.stop_ids,
        samples=samples,
    )


def _where_texts_part(now: Golden, then: Golden) -> str:
    for mine, theirs in zip(now.samples, then.samples):
        if mine.text != theirs.text and mine.form in ("conversation", "prompt"):
            at = _first_difference(mine.text, theirs.text)
            return f": it writes {mine.text[at : at + 20]!r} where it wrote {theirs.text[at : at + 20]!r}"
    return ""


def _first_difference(one: str | tuple[int, ...], other: str | tuple[int, ...]) -> int:
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)
