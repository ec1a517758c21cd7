"""Which kinds of JSON values a schema allows, and what a value is that a call writes without quotes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

KINDS = frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))


def kinds_of(schema: Any, whole: Any, seen: tuple[str, ...] = ()) -> frozenset[str]:
    """The names of the types that `schema` allows; `whole` is what its references are paths in. Where there are numbers,
    there are whole ones. What is no schema, and a reference that leads nowhere or back to itself, allows all."""
    if not isinstance(schema, Mapping):
        return frozenset() if schema is False else KINDS
    found = KINDS
    if "type" in schema:
        named = {one for one in _listed(schema, "type") if isinstance(one, str)} or {schema["type"]}
        found &= named | ({"integer"} if "number" in named else set())
    if "const" in schema:
        found &= {kind_of(schema["const"])}
    if "enum" in schema:
        found &= {kind_of(one) for one in _listed(schema, "enum")}
    for key in ("anyOf", "oneOf"):
        if key in schema:
            found &= frozenset[str]().union(*(kinds_of(one, whole, seen) for one in _listed(schema, key)))
    for one in _listed(schema, "allOf"):
        found &= kinds_of(one, whole, seen)
    ref = schema.get("$ref")
    if isinstance(ref, str) and ref not in seen:
        found &= kinds_of(target(whole, ref), whole, (*seen, ref))
    return found


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def target(whole: Any, ref: str) -> Any:
    """What a reference within a schema points to; True, which allows all, where that is nothing."""
    found = whole
    for part in ref.split("/")[1:] if ref.startswith("#") else ["?"]:
        name = part.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(name)] if isinstance(found, list) else found[name]
        except (KeyError, IndexError, ValueError, TypeError):
            return True
    return found


def resolved(schema: Any, whole: Any) -> Any:
    """A schema, or what it points to where it is a reference."""
    seen: set[str] = set()
    while isinstance(schema, Mapping) and isinstance(ref := schema.get("$ref"), str) and ref not in seen:
        seen.add(ref)
        schema = target(whole, ref)
    return schema


def kind_of(value: Any) -> str:
    """The narrowest type of a value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, Sequence) else "object"


def read_value(text: str, kinds: frozenset[str]) -> str:
    """The JSON of a value that may be a text, and is written without quotes where it is one: what is JSON of another kind
    among `kinds` is that, and all else is a text."""
    try:
        value = json.loads(text, parse_constant=_no_number) if text == text.strip() else text
    except ValueError:
        value = text
    return text if not isinstance(value, str) and kind_of(value) in kinds else json.dumps(text, ensure_ascii=False)


def _no_number(said: str) -> NoReturn:
    raise ValueError(said)


def kinds_of_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, frozenset[str]]]:
    """The kinds of each parameter, by its name, of each of OpenAI's tools, by its name."""
    found: dict[str, dict[str, frozenset[str]]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        whole = function.get("parameters") or {}
        top = resolved(whole, whole)
        named = top.get("properties") if isinstance(top, Mapping) else None
        listed = named.items() if isinstance(named, Mapping) else ()
        found[function["name"]] = {key: kinds_of(one, whole) for key, one in listed}
    return found
