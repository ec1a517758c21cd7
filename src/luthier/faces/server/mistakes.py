"""What is wrong with a body, in a few sentences that name its fields as they were sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Mistake: TypeAlias = Mapping[str, Any]
# Sentences, and parts of a path, that are told at most: a body of thousands of texts may be wrong in each of them.
MOST, DEEPEST = 5, 12
OBJECT = "send a JSON object, with Content-Type: application/json"
# What a value may be, by the mistake that it is none.
EXPECTED = {
    "int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "string_type": "a string",
    "list_type": "a list", "dict_type": "an object", "model_type": "an object", "model_attributes_type": "an object",
}  # fmt: skip


def sentences_of(mistakes: Sequence[Mistake], body: Any) -> tuple[list[str], str | None]:
    """Sentences, and the field that the first of them is about. A mistake's place begins with body, query or path; `body` is
    what was sent."""
    found: dict[str, str | None] = {}
    for mistake in _without_followers(_meant(mistakes, 1)):
        path = _path(mistake["loc"][1:], body if mistake["loc"][0] == "body" else None)
        found.setdefault(*_tell(mistake, path))
    said = list(found)
    if len(said) > MOST:
        said = [*said[:MOST], f"and {len(said) - MOST} more"]
    return said, next(iter(found.values()), None)


def _tell(mistake: Mistake, path: str) -> tuple[str, str | None]:
    kind, ctx = mistake["type"], mistake.get("ctx", {})
    if kind == "json_invalid":
        return (
            f"the body is not valid JSON ({ctx.get('error', mistake['msg'])}, at character {mistake['loc'][-1]})",
            None,
        )
    if mistake["loc"] == ("body",) and kind in ("model_attributes_type", "model_type", "dict_type", "missing"):
        return f"the body is {'empty' if kind == 'missing' else 'no JSON object'}; {OBJECT}", None
    path = path or "body"
    if kind == "extra_forbidden":
        said = "this server does not support this field; leave it out"
    elif kind == "missing":
        said = "is required"
    elif kind == "union_tag_invalid":
        path = f"{path}.{ctx['discriminator'].strip(chr(39))}"
        said = f"{ctx['tag']!r} is not supported here; use one of {ctx['expected_tags']}"
    elif (kind == "literal_error" and ctx["expected"] == "False") or (kind == "too_long" and ctx["max_length"] == 0):
        said = "this server does not do this; leave it out"
    elif kind == "literal_error" or kind in EXPECTED:
        said = f"is {shown(mistake['input'])}, expected {_expected(mistake)}"
    else:
        said = ctx.get("error") or mistake["msg"][:1].lower() + mistake["msg"][1:]
    return f"{path}: {said}", path


def _expected(mistake: Mistake) -> str:
    """What was to be there. Several types, of a union, are one mistake under the name of the first."""
    ctx: Mapping[str, Any] = mistake.get("ctx", {})
    return str(ctx.get("expected") or EXPECTED[mistake["type"]])


def shown(value: Any) -> str:
    """A value as it was sent, but for what holds others."""
    if isinstance(value, Mapping | list):
        return "an object" if isinstance(value, Mapping) else "a list"
    written = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return written if len(written) <= 60 else f"{written[:60]}..."


def _path(place: Sequence[int | str], body: Any) -> str:
    """A place without what is there of a union's branches: their names are no keys of what was sent."""
    parts, here = [], body
    for at, part in enumerate(place):
        if isinstance(here, Mapping):
            if part not in here and (at < len(place) - 1 or is_branch(part)):
                continue
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        elif body is not None or is_branch(part):
            continue
        parts.append(str(part))
    return ".".join(parts if len(parts) <= DEEPEST else [*parts[:DEEPEST], ".."])


def is_branch(part: int | str) -> bool:
    """Branches of a union stand in a place under their types' names."""
    return isinstance(part, str) and (
        part[:1].isupper() or "[" in part or "-" in part or part in ("str", "int", "float", "bool")
    )


def _meant(mistakes: Sequence[Mistake], start: int) -> list[Mistake]:
    """Of each union the mistakes of the branch that was meant: not one that is for another type altogether, and of the others
    the one with the fewest, or else the one that was right for longest."""
    found: list[Mistake] = []
    unions: dict[Sequence[int | str], dict[int | str, list[Mistake]]] = {}
    for one in mistakes:
        place = one["loc"]
        at = next((at for at in range(start, len(place)) if is_branch(place[at])), None)
        if at is None:
            found.append(one)
        else:
            unions.setdefault(tuple(place[:at]), {}).setdefault(place[at], []).append(one)
    for place, branches in unions.items():
        kept = [_meant(one, len(place) + 1) for one in branches.values()]
        fitting = [one for one in kept if not any(_is_other(mistake, len(place) + 1) for mistake in one)]
        best = max(fitting, key=lambda one: (-len(one), _reached(one, len(place) + 1)), default=None)
        found += _neither(kept, place) if best is None else best
    return found


def _reached(mistakes: Sequence[Mistake], start: int) -> tuple[int, ...]:
    """The place in lists at which the first mistake is."""
    first = mistakes[0]["loc"][start:] if mistakes else ()
    return tuple(part if isinstance(part, int) else 0 for part in first)


def _is_other(mistake: Mistake, start: int) -> bool:
    """Whether it says that something else was meant: it is about the value as a whole, or about its `type`."""
    kind, rest = mistake["type"], tuple(mistake["loc"][start:])
    if rest == ("type",):
        return kind in ("literal_error", "missing")
    return not rest and (kind.endswith(("_type", "_parsing")) or kind == "literal_error")


def _neither(branches: Sequence[Sequence[Mistake]], place: Sequence[int | str]) -> list[Mistake]:
    """What to say where no branch was meant."""
    of_type = [one for branch in branches for one in branch if one["loc"][len(place) + 1 :] == ("type",)]
    named = [one["ctx"]["expected"] for one in of_type if one["type"] == "literal_error"]
    if named:
        first = next(one for one in of_type if one["type"] == "literal_error")
        return [{**first, "loc": (*place, "type"), "ctx": {"expected": ", ".join(dict.fromkeys(named))}}]
    others = [one for branch in branches for one in branch if _is_other(one, len(place) + 1)]
    if not all(one["type"] == "literal_error" or one["type"] in EXPECTED for one in others):
        return others
    expected = dict.fromkeys(_expected(one) for one in others)
    return [{**others[0], "loc": place, "ctx": {"expected": " or ".join(expected)}}]


def _without_followers(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """Without those that follow from a `type` that is another."""
    wrong = {tuple(one["loc"][:-1]) for one in mistakes if one["type"] == "literal_error" and one["loc"][-1] == "type"}
    return [
        one for one in mistakes
        if one["loc"][-1] == "type" or not any(tuple(one["loc"][: len(place)]) == place for place in wrong)
    ]  # fmt: skip
