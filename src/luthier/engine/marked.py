"""Rules of a grammar for the marks of calls, and for arguments that stand between marks each."""

from __future__ import annotations

import json
from typing import Any

from luthier.core.errors import ConfigError
from luthier.engine.formats import NUMBER, other_terms, text_terms
from luthier.engine.schemas import NOTES
from luthier.engine.structure import WAYS
from luthier.text.calls import CallForm
from luthier.text.values import kinds_of, target

# What may be said of the arguments together; more cannot be kept to where each stands alone.
TOGETHER = ("type", "properties", "required", "additionalProperties", "$ref", *NOTES)


def marked_rules(form: CallForm, at: int, parameters: dict[str, Any], where: str) -> list[str]:
    """The rule `begin_{at}_0` and what it needs: the arguments behind a name, in the order of their schema, the last marks
    included. Arguments that it does not name are not written. Raises ConfigError."""
    path, whole = "#", parameters
    while "$ref" in whole and whole["$ref"] != path:
        path = whole["$ref"]
        whole = target(parameters, path)
    named, required = whole.get("properties", {}), whole.get("required", [])
    strange = [one for one in whole if one not in TOGETHER and not one.startswith("x-")]
    strange += ["required"] if set(required) - set(named) else []
    strange += ["additionalProperties"] if not named and isinstance(whole.get("additionalProperties"), dict) else []
    if strange:
        raise ConfigError(
            f"{where}: `{strange[0]}` cannot be kept to in the calls that the template of this model writes, where each "
            "argument stands alone; name the arguments in properties"
        )
    first, middle, following, last, none = form.joined
    left, count = len(form.close), len(named)
    if not named and not none:
        raise ConfigError(
            f"{where}: the template of this model writes no calls without arguments; name one in properties"
        )
    rules, bare = list[str](), True
    for number, (key, schema) in enumerate(named.items()):
        if middle in key:
            raise ConfigError(f"{where}: {key!r} holds what ends a name in the calls of this model; name it otherwise")
        pointer = f"{path.replace('#', '#/$defs/whole', 1)}/properties/{_escaped(key)}"
        rules += _value(form, f"value_{at}_{number}", pointer, schema, parameters, f"{where}.{key}")
        optional = key not in required
        said = f"{key}{middle}", f"value_{at}_{number} more_{at}_{number + 1}"
        if bare:
            # Behind the last of them nothing is left to begin with, unless the template writes calls without arguments.
            skipped = f" | begin_{at}_{number + 1}" if optional and (none or number + 1 < count) else ""
            rules.append(f"begin_{at}_{number}: {said_of(form, first + said[0])} {said[1]}{skipped}")
        if number:
            skipped = f" | more_{at}_{number + 1}" if optional else ""
            rules.append(f"more_{at}_{number}: {said_of(form, following[left:] + said[0])} {said[1]}{skipped}")
        bare = bare and optional
    if bare and none:
        rules.append(f"begin_{at}_{count}: {said_of(form, none)}")
    if named:
        rules.append(f"more_{at}_{count}: " + (said_of(form, last[left:]) or '""'))
    return rules


def _value(form: CallForm, rule: str, path: str, schema: Any, parameters: dict[str, Any], where: str) -> list[str]:
    """The rule of a value and of the marks behind every value. Texts stand as they are, all else as JSON."""
    kinds, close = kinds_of(schema, parameters), form.close
    if not kinds:
        raise ConfigError(f"{where}: no value satisfies its schema; mend it")
    held = {"$defs": {"whole": moved(parameters, "#/$defs/whole")}, "x-guidance": WAYS}
    if "string" not in kinds:
        return [f"{rule}: %json {json.dumps({'$ref': path, **held})} {said_of(form, close)}"]
    terms = [text_terms(schema, parameters, where), f"~/(.|\\n)*{regex_of(close)}(.|\\n)*/"]
    # What would be read as JSON of another kind is no text.
    terms += [f"~/{NUMBER}/"] if "integer" in kinds or "number" in kinds else []
    terms += [f"~/{one}/" for kind, one in (("boolean", "true|false"), ("null", "null")) if kind in kinds]
    nested = [kind for kind in ("array", "object") if kind in kinds]
    terms += [f"~/{chr(92)}{'[' if kind == 'array' else '{'}(.|\\n)*/" for kind in nested]
    name = rule.upper()
    text = " | ".join([f"({' & '.join(terms)})", *other_terms(schema, parameters, where)])
    head, mark, _ = cut_of(form, close)
    if mark is None:
        rules = [f"{rule}_text[suffix={json.dumps(close)}]: {name}", f"{name}: {text}"]
    else:
        following = said_of(form, close[len(head) :])
        rules = [
            f"{rule}_text: {name} {following}",
            f"{name}: ({text}) {json.dumps(head)}" if head else f"{name}: {text}",
        ]
    json_too = f" | %json {json.dumps({'allOf': [{'$ref': path}], 'type': nested, **held})} {said_of(form, close)}"
    return [*rules, f"{rule}: {rule}_text{json_too if nested else ''}"]


def moved(schema: dict[str, Any], where: str) -> Any:
    """A schema that stands at the path `where` of another; what it points to within itself is moved along."""
    return json.loads(json.dumps(schema).replace('"$ref": "#', f'"$ref": "{where}'))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1").replace("%", "%25")


def said_of(form: CallForm, text: str) -> str:
    """`text` itself: its letters, and its special tokens by their ids."""
    head, mark, rest = cut_of(form, text)
    said = json.dumps(head, ensure_ascii=False) if head else ""
    return said if mark is None else f"{said} <[{mark[1]}]> {said_of(form, rest)}"


def cut_of(form: CallForm, text: str) -> tuple[str, tuple[str, int] | None, str]:
    """What stands before the first special token in a text, the token, and what follows it."""
    found = [(text.index(spelled), -len(spelled), spelled, id) for spelled, id in form.marks if spelled in text]
    if not found:
        return text, None, ""
    at, _, spelled, id = min(found)
    return text[:at], (spelled, id), text[at + len(spelled) :]


def regex_of(text: str) -> str:
    """`text` itself as a regular expression between slashes."""
    return "".join(f"\\{one}" if one in r"\.+*?()|[]{}^$/" else "\\n" if one == "\n" else one for one in text)
