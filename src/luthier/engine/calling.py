"""Calls of tools, held to their schemas while a text is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from luthier.core.errors import ConfigError, did_you_mean
from luthier.engine.schemas import prepare
from luthier.engine.structure import WAYS, Structure
from luthier.text.calls import CallForm


def structure_of_calls(
    form: CallForm,
    tools: Sequence[dict[str, Any]],
    choice: Literal["auto", "required"] | str = "auto",
    *,
    parallel: bool = True,
) -> Structure:
    """What an answer may be where `tools` (OpenAI's objects) may be called: text without calls, or text and then calls whose
    arguments satisfy their schemas. "required" leaves the calls alone; any other `choice` is the name of the one to call.

    Raises ConfigError for a tool without a name, for a `choice` that there is none of, and for schemas that cannot be kept to.
    """
    functions = [_function(tool, at) for at, tool in enumerate(tools)]
    names = [one["name"] for one in functions]
    if len(set(names)) < len(names):
        raise ConfigError(f"tools: {next(one for one in names if names.count(one) > 1)!r} is there twice; rename one")
    if choice not in ("auto", "required"):
        if choice not in names:
            raise ConfigError(f"tool_choice: there is no tool {choice!r}; {did_you_mean(choice, names)}")
        functions = [functions[names.index(choice)]]
    if not functions:
        raise ConfigError("tools: there is none to call; name one, or leave tools out")
    calls = " | ".join(f"call_{at}" for at in range(len(functions)))
    rules = [f"call_{at}: %json {json.dumps(_schema(form, one))}" for at, one in enumerate(functions)]
    rules.append(f"call: {calls}")
    many = parallel and bool(form.between)
    rules.append(f"calls: call{f' ({_said(form, form.between)} call)*' if many else ''} {_said(form, form.after)}")
    bare = form.before.lstrip("\n")
    head, mark, _ = _cut(form, form.before)
    if choice != "auto":
        rules.append(f"start: {_said(form, form.opening)} calls")
    elif mark is not None:
        # A special token ends the text, which does not spell it either.
        marked, spelled = form.before[len(head) :], f"~/(.|\\n)*{_regex(mark[0])}(.|\\n)*/"
        rules += [
            f"start: TEXT | {_said(form, bare)} calls | SAID {_said(form, marked)} calls",
            f"TEXT: /(.|\\n)*/ & {spelled}",
            f"SAID: /(.|\\n)+{_regex(head)}/ & {spelled}",
        ]
    elif not form.before:
        rules += ["start: TEXT | calls", r"TEXT: /([^{ \n\t](.|\n)*)?/"]
    else:
        # Text with the mark of a call in it is no plain text.
        pattern = _regex(bare)
        rules += [
            "start: TEXT | said calls",
            f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{pattern}(.|\\n)*/",
            f"said[suffix={json.dumps(bare)}]: /(.|\\n)*/",
        ]
    return Structure(grammar="\n".join(rules))


def _function(tool: dict[str, Any], at: int) -> dict[str, Any]:
    found = tool.get("function", tool)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        raise ConfigError(f"tools.{at}: a tool is an object with a function that has a name")
    return found


def _schema(form: CallForm, function: dict[str, Any]) -> dict[str, Any]:
    """Of a whole call. What its parameters point to within themselves is moved along."""
    asked = function.get("parameters") or {"type": "object", "properties": {}}
    try:
        parameters = prepare(asked)
    except ConfigError as err:
        raise ConfigError(f"tools: the parameters of {function['name']!r}: {err}") from None
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise ConfigError(f"tools: the parameters of {function['name']!r} are no object; wrap them in one")
    where = f"#/properties/{form.arguments}"
    moved = json.loads(json.dumps({"type": "object", **parameters}).replace('"$ref": "#', f'"$ref": "{where}'))
    numbered = {"id": {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}} if form.numbered else {}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, form.arguments: moved, **numbered},
        "required": ["name", form.arguments, *numbered],
        "additionalProperties": False,
        "x-guidance": WAYS,
    }


def _said(form: CallForm, text: str) -> str:
    """`text` itself: its letters, and its special tokens by their ids."""
    head, mark, rest = _cut(form, text)
    said = json.dumps(head, ensure_ascii=False) if head else ""
    return said if mark is None else f"{said} <[{mark[1]}]> {_said(form, rest)}"


def _cut(form: CallForm, text: str) -> tuple[str, tuple[str, int] | None, str]:
    """What stands before the first special token in a text, the token, and what follows it."""
    found = [(text.index(spelled), -len(spelled), spelled, id) for spelled, id in form.marks if spelled in text]
    if not found:
        return text, None, ""
    at, _, spelled, id = min(found)
    return text[:at], (spelled, id), text[at + len(spelled) :]


def _regex(text: str) -> str:
    """`text` itself as a regular expression between slashes."""
    return "".join(f"\\{one}" if one in r"\.+*?()|[]{}^$/" else "\\n" if one == "\n" else one for one in text)
