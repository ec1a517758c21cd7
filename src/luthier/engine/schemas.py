"""Which JSON schemas are honoured to the letter while a text is written; any other is refused with the keyword named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from luthier.core.errors import ConfigError, did_you_mean

# Keywords whose values are a schema, a list of them, or a table of them.
ONE = ("additionalProperties", "additionalItems")
MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
NAMED = ("properties", "patternProperties")
NUMBERS = (
    "minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
)  # fmt: skip
PLAIN = ("$ref", "const", "enum", "type", "items", "required", "pattern", "format", *NUMBERS)
KINDS: dict[str, Any] = {
    **dict.fromkeys((*MANY, "enum", "required"), list),
    **dict.fromkeys(NAMED, dict),
    **dict.fromkeys(("$ref", "pattern", "format"), str),
    **dict.fromkeys(NUMBERS, int | float),
}
# They say something about a value and restrict nothing.
NOTES = (
    "$schema", "$comment", "$defs", "definitions", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "contentSchema",
)  # fmt: skip
CASES, OF_ALL, BY_PATH = (
    "write the cases as anyOf",
    "say it of every item with items",
    "point to #/$defs/NAME with $ref",
)
# What cannot be honoured token by token, and what to do.
INSTEAD = {
    "not": "say what is allowed with enum, type or pattern",
    **dict.fromkeys(("if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas"), CASES),
    **dict.fromkeys(("contains", "minContains", "maxContains"), OF_ALL),
    "propertyNames": "use patternProperties with additionalProperties: false",
    "unevaluatedProperties": "use additionalProperties where all the properties stand",
    "unevaluatedItems": "use items where all the items stand",
    **dict.fromkeys(
        ("$id", "id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"), BY_PATH
    ),
}
OTHERWISE = "leave it out, and check it when the text is written"
DRAFTS = ("/draft/2020-12/schema", "/draft/2019-09/schema", "/draft-07/schema", "/draft-06/schema")
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_DATE = (
    "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    f"|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))|([0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29"
)
# Written out, since llguidance has a 29 February in every year, and a 61st second in every minute.
DATES = {"date": f"^({_DATE})$", "time": f"^{_TIME}$", "date-time": f"^({_DATE})T{_TIME}$"}
FORMATS = (*DATES, "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# What is no letter in ASCII may be one to the next reader of the pattern.
SIGNS = re.compile(r"(?<!\\)(\\\\)*(\\[WD]|\[\^[^\]]*\\[wd])")
# Without \uXXXX these cannot be written in JSON, and llguidance leaves them out of a text; of a range it leaves the rest.
HIDDEN = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
ESCAPED = re.compile(r"(?<!\\)(\\\\)*\\(x[01]|x7[fF]|u00[01]|u007[fF]|u\{|0|c)")
RANGE = re.compile(r"\\x00-\\x1[fF]|\\u0000-\\u001[fF]")
# The grammar counts in float64; beyond this whole numbers are rounded.
EXACT = 2**53


def read_schema(path: str | Path) -> dict[str, Any] | bool:
    """The schema in a file. Raises ConfigError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read ({err.strerror}); give a schema, or the path of its file") from None
    except ValueError as err:
        raise ConfigError(f"{path}: not valid JSON ({err}); mend the file") from None
    if not isinstance(found, dict | bool):
        raise ConfigError(f"{path}: a JSON schema is an object, and this is none; mend the file")
    return found


def prepare(schema: dict[str, Any] | bool) -> dict[str, Any]:
    """The schema from which the grammar is made: dates and times written out, what has no effect left out.

    Raises ConfigError for what would not be honoured, with its path and keyword.
    """
    if isinstance(schema, bool):
        if not schema:
            raise ConfigError("the schema is `false`, which nothing satisfies; give one that something does")
        return {}
    whole = deepcopy(schema)
    draft = str(whole.get("$schema", DRAFTS[0])).rstrip("#")
    if not draft.endswith(DRAFTS):
        _refuse("#", "$schema", "give a schema of draft 2020-12, 2019-09 or 7")
    todo: list[tuple[str, Any]] = [("#", whole)]
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    while todo:
        where, one = todo.pop()
        if id(one) in seen or one is True or one is False:
            continue
        seen.add(id(one))
        if not isinstance(one, dict):
            raise ConfigError(f"{where}: a JSON schema is an object, true or false; mend it")
        _check(where, one, new=draft.endswith(DRAFTS[0]))
        if "$ref" in one:
            todo.append((one["$ref"], _target(whole, where, one["$ref"])))
        todo += children(where, one)
        found.append(one)
    for one in found:
        _rewrite(one)
    return whole


def children(where: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas right below one, each with its path."""
    for key, value in schema.items():
        if key in ONE or (key == "items" and not isinstance(value, list)):
            yield f"{where}/{key}", value
        elif key in MANY or key == "items":
            yield from ((f"{where}/{key}/{at}", one) for at, one in enumerate(value))
        elif key in NAMED:
            yield from ((f"{where}/{key}/{_escape(name)}", one) for name, one in value.items())


def blame(schema: dict[str, Any], passes: Callable[[dict[str, Any]], bool], tries: int = 300) -> tuple[str, str]:
    """(path, keyword) of the first keyword, deepest first, without which a schema that was refused passes."""
    whole = deepcopy(schema)
    todo: list[tuple[str, Any]] = [("#", whole)]
    found: list[tuple[str, dict[str, Any]]] = []
    seen: set[int] = set()
    while todo:
        where, one = todo.pop()
        if isinstance(one, dict) and id(one) not in seen:
            seen.add(id(one))
            found.append((where, one))
            todo += children(where, one)
            if "$ref" in one:
                todo.append((one["$ref"], _target(whole, where, one["$ref"])))
    places = [(where, one, key) for where, one in reversed(found) for key in one if key not in NOTES]
    for where, one, key in places[:tries]:
        kept = list(one.items())
        del one[key]
        good = passes(whole)
        one.clear()
        one.update(kept)
        if good:
            return where, key
    return "#", next((key for key in schema if key not in NOTES), "type")


def _check(where: str, schema: dict[str, Any], new: bool) -> None:
    """Raises ConfigError for a keyword that is not honoured, or not with this value."""
    for key, value in schema.items():
        if key == "$id" and where == "#":
            continue
        if key == "uniqueItems" and value is False:
            continue
        if key in INSTEAD or key == "uniqueItems":
            _refuse(where, key, INSTEAD.get(key, OTHERWISE))
        if key not in (*ONE, *MANY, *NAMED, *PLAIN, *NOTES) and (not key.startswith("x-") or key == "x-guidance"):
            known = (*ONE, *MANY, *NAMED, *PLAIN)
            raise ConfigError(f"{where}: there is no keyword `{key}` in JSON schemas; {did_you_mean(key, known)}")
        if key in KINDS and (not isinstance(value, KINDS[key]) or (key in NUMBERS and isinstance(value, bool))):
            raise ConfigError(f"{where}: `{key}` has a value of the wrong kind; see json-schema.org")
        if key in (*NUMBERS, "const", "enum") and any(abs(number) > EXACT for number in _numbers(value)):
            _refuse(where, key, "keep numbers below 2^53")
    patterns = [schema.get("pattern", ""), *schema.get("patternProperties", ())]
    if any(SIGNS.search(one) for one in patterns):
        _refuse(where, "pattern" if "pattern" in schema else "patternProperties", "write the characters out")
    if any(HIDDEN.search(one) or ESCAPED.search(RANGE.sub("", one)) for one in patterns):
        _refuse(where, "pattern" if "pattern" in schema else "patternProperties", "keep control characters out")
    for key in ("const", "enum"):
        if any(HIDDEN.search(one) for one in _texts(schema.get(key))):
            _refuse(where, key, "keep control characters out")
    if "format" in schema and schema["format"] not in FORMATS:
        raise ConfigError(
            f"{where}: `format` {schema['format']!r} is not known; {did_you_mean(str(schema['format']), FORMATS)}"
        )
    # Names that are not listed may come twice in the grammar, and count once.
    least = schema.get("minProperties", 0)
    if isinstance(least, int | float) and least > 1 and least > len(set(schema.get("required", ()))) + 1:
        _refuse(where, "minProperties", "name the properties that have to be there with required")
    if isinstance(schema.get("items"), list) and ((new and "$schema" in schema) or "prefixItems" in schema):
        _refuse(where, "items", "write a list of schemas as prefixItems")
    if "prefixItems" in schema and not new:
        _refuse(where, "prefixItems", "write it as a list in items, as drafts before 2020-12 do")


def _rewrite(schema: dict[str, Any]) -> None:
    for key in ("$id", "deprecated", "contentSchema", "uniqueItems"):
        schema.pop(key, None)
    if not isinstance(schema.get("items"), list):
        # Without effect in every draft; llguidance would read prefixItems otherwise beside it.
        schema.pop("additionalItems", None)
    if schema.get("format") in DATES:
        written = {"pattern": DATES[schema.pop("format")]}
        if "pattern" in schema:
            schema["allOf"] = [*schema.get("allOf", ()), written]
        else:
            schema |= written


def _target(whole: dict[str, Any], where: str, ref: str) -> Any:
    """What a reference points to. Raises ConfigError for one that leaves the schema, or points nowhere."""
    if ref != "#" and not ref.startswith("#/"):
        raise ConfigError(f"{where}: `$ref` {ref!r} is no path in this schema; {BY_PATH}")
    found: Any = whole
    for part in unquote(ref).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(name)] if isinstance(found, list) else found[name]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ConfigError(f"{where}: `$ref` {ref!r} points to nothing in this schema; {BY_PATH}") from None
    return found


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value


def _refuse(where: str, key: str, instead: str) -> NoReturn:
    raise ConfigError(f"{where}: `{key}` cannot be kept to while a text is written; {instead}")
