"""Texts of a schema as terminals of a grammar: for what a model writes without quotes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from luthier.core.errors import ConfigError
from luthier.text.values import kind_of, kinds_of, resolved

ANY = r"/(.|\n)*/"
_LABEL, _HEX = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?", "[0-9a-fA-F]"
_HOST, _GROUP, _BYTE = rf"{_LABEL}(\.{_LABEL})*", f"{_HEX}{{1,4}}", "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LOCAL = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,30}"
_URI = f"([a-zA-Z0-9._~!$&'()*+,;=:@-]|%{_HEX}{{2}})"
_NAME = f"([a-zA-Z0-9._~!$&'()*+,;=-]|%{_HEX}{{2}})"
_TIME = "T([0-9]+H([0-9]+M([0-9]+S)?)?|[0-9]+M([0-9]+S)?|[0-9]+S)"
# A part of what each of them allows, as the RFCs that JSON Schema names have it.
FORMATS = {
    "duration": f"P([0-9]+W|([0-9]+Y([0-9]+M([0-9]+D)?)?|[0-9]+M([0-9]+D)?|[0-9]+D)({_TIME})?|{_TIME})",
    "email": rf"{_LOCAL}(\.{_LOCAL})?@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "ipv6": "|".join(
        [f"{_GROUP}(:{_GROUP}){{7}}"]
        + [
            (f"{_GROUP}(:{_GROUP}){{0,{most - 1}}}" if most else "")
            + "::"
            + (f"({_GROUP}(:{_GROUP}){{0,{6 - most - 1}}})?" if most < 6 else "")
            for most in range(7)
        ]
    ),
    "uuid": f"{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}",
    "uri": f"[a-zA-Z][a-zA-Z0-9+.-]*:(//{_NAME}*(:[0-9]*)?(/{_URI}*)*|/?{_URI}+(/{_URI}*)*)"
    f"(\\?({_URI}|[/?])*)?(#({_URI}|[/?])*)?",
}
LONGEST = {"hostname": 253, "email": 254}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
WHOLE = "-?(0|[1-9][0-9]*)"
NUMBER = rf"{WHOLE}(\.[0-9]+)?([eE][+-]?[0-9]+)?"


def text_terms(schema: Any, whole: Any, where: str, seen: tuple[str, ...] = ()) -> str:
    """The texts that a schema allows, as an expression of terminals. Raises ConfigError, with `where` in front, for what
    cannot be kept to."""
    if not isinstance(schema, Mapping):
        return ANY
    terms = [f"/(.|\\n){{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}/"]
    if not {"minLength", "maxLength"} & set(schema):
        terms = [ANY]
    if "const" in schema or "enum" in schema:
        said = [one for one in [*schema.get("enum", ()), *_const(schema)] if isinstance(one, str)]
        terms += ["(" + " | ".join(json.dumps(one, ensure_ascii=False) for one in said) + ")"] if said else []
    if "pattern" in schema:
        terms.append(search(schema["pattern"], where))
    if "format" in schema:
        terms.append(f"/{_slashed(FORMATS[schema['format']])}/")
        if schema["format"] in LONGEST:
            terms.append(f"/.{{1,{LONGEST[schema['format']]}}}/")
    if "$ref" in schema:
        if schema["$ref"] in seen:
            raise ConfigError(f"{where}: `$ref` {schema['$ref']!r} points to itself; say what the text is")
        terms.append(text_terms(resolved(schema, whole), whole, where, (*seen, schema["$ref"])))
    for key in ("allOf", "anyOf", "oneOf"):
        if key not in schema:
            continue
        cases = [one for one in schema[key] if "string" in kinds_of(one, whole)]
        parts = [text_terms(one, whole, where, seen) for one in cases]
        if key == "oneOf" and len(parts) > 1:
            others = [[f"~{other}" for other in parts if other is not one] for one in parts]
            parts = ["(" + " & ".join([one, *other]) + ")" for one, other in zip(parts, others)]
        terms.append("(" + (" & " if key == "allOf" else " | ").join(parts) + ")")
    terms = [one for one in terms if one != ANY] or [ANY]
    return terms[0] if len(terms) == 1 else "(" + " & ".join(terms) + ")"


def other_terms(schema: Any, whole: Any, where: str) -> list[str]:
    """Terminals of the null, truth values and numbers that a schema allows beside texts. Raises ConfigError."""
    found, schema = dict[str, None](), resolved(schema, whole)
    kinds = kinds_of(schema, whole) - {"string", "array", "object"}
    if isinstance(schema, Mapping) and ("enum" in schema or "const" in schema):
        values = [*schema.get("enum", ()), *_const(schema)]
        return [json.dumps(json.dumps(one)) for one in values if kind_of(one) in kinds]
    if isinstance(schema, Mapping) and ("anyOf" in schema or "oneOf" in schema):
        for one in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
            found |= dict.fromkeys(other_terms(one, whole, where)) if kinds_of(one, whole) & kinds else {}
        return list(found)
    numbers = kinds & {"integer", "number"}
    if (
        isinstance(schema, Mapping)
        and kinds
        and ("allOf" in schema or (numbers and any(one in schema for one in BOUNDS)))
    ):
        raise ConfigError(
            f"{where}: a text beside a number within bounds cannot be told from it in the calls that the template of this "
            "model writes; make it one of the two"
        )
    found |= {'"null"': None} if "null" in kinds else {}
    found |= {'"true"': None, '"false"': None} if "boolean" in kinds else {}
    found |= {f"/{NUMBER if 'number' in numbers else WHOLE}/": None} if numbers else {}
    return list(found)


def _const(schema: Mapping[str, Any]) -> list[Any]:
    return [schema["const"]] if "const" in schema else []


def search(pattern: str, where: str) -> str:
    """A pattern of JSON Schema, which may stand anywhere in a text unless its ends are said, as one terminal of the whole
    text. Raises ConfigError for an end that is said inside of it."""
    found = []
    for one in _alternatives(pattern):
        begun = one.startswith("^")
        ended = one.endswith("$") and not re.search(r"(?<!\\)(\\\\)*\\\$$", one)
        inner = one[int(begun) : len(one) - int(ended)]
        if re.search(r"(?<![\\\[])(\\\\)*[$^]", re.sub(r"\[\^?[^\]]*\]", "", inner)):
            raise ConfigError(f"{where}: `pattern` {pattern!r} has ^ or $ in the middle; say them at its ends alone")
        found.append(("" if begun else r"(.|\n)*") + f"({_ascii(inner)})" + ("" if ended else r"(.|\n)*"))
    return f"/{_slashed('|'.join(found))}/"


def _alternatives(pattern: str) -> list[str]:
    """What stands between the bars that are in no brackets."""
    found, depth, at = [""], 0, 0
    while at < len(pattern):
        size = 2 if pattern[at] == "\\" else 1
        one = pattern[at : at + size]
        if one == "[":
            size = _class_end(pattern, at) - at
            one = pattern[at : at + size]
        depth += (one == "(") - (one == ")")
        if one == "|" and depth == 0:
            found.append("")
        else:
            found[-1] += one
        at += size
    return found


def _class_end(pattern: str, at: int) -> int:
    """Where the brackets of characters end that begin at `at`."""
    end = at + 1 + pattern.startswith("^", at + 1)
    while end < len(pattern) and pattern[end] != "]":
        end += 2 if pattern[end] == "\\" else 1
    return end + 1


def _ascii(pattern: str) -> str:
    """With the digits and letters of JSON Schema, which are those of ASCII."""
    found, at, inside = "", 0, False
    while at < len(pattern):
        one = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        inside = (inside or one == "[") and one != "]"
        letters = {"\\d": "0-9", "\\w": "a-zA-Z0-9_"}.get(one)
        found += one if letters is None else letters if inside else f"[{letters}]"
        at += len(one)
    return found


def _slashed(pattern: str) -> str:
    """For between slashes."""
    return re.sub(r"\\.|/", lambda one: "\\/" if one[0] == "/" else one[0], pattern, flags=re.DOTALL).replace(
        "\n", r"\n"
    )
