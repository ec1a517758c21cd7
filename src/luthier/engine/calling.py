"""Calls of tools, held to their schemas while a text is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from luthier.core.errors import ConfigError, did_you_mean
from luthier.engine.marked import cut_of, marked_rules, moved, regex_of, said_of
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
    rules = [rule for at, one in enumerate(functions) for rule in _call(form, at, one)]
    rules.append(f"call: {calls}")
    many = parallel and bool(form.between)
    rules.append(f"calls: call{f' ({said_of(form, form.between)} call)*' if many else ''} {said_of(form, form.after)}")
    bare = form.before.lstrip("\n")
    head, mark, _ = cut_of(form, form.before)
    if choice != "auto":
        rules.append(f"start: {said_of(form, form.opening)} calls")
    elif mark is not None:
        # A special token ends the text, which does not spell it either.
        marked, spelled = form.before[len(head) :], f"~/(.|\\n)*{regex_of(mark[0])}(.|\\n)*/"
        rules += [
            f"start: TEXT | {said_of(form, bare)} calls | SAID {said_of(form, marked)} calls",
            f"TEXT: /(.|\\n)*/ & {spelled}",
            f"SAID: /(.|\\n)+{regex_of(head)}/ & {spelled}",
        ]
    elif not form.before:
        rules += ["start: TEXT | calls", r"TEXT: /([^{ \n\t](.|\n)*)?/"]
    else:
        # Text with the mark of a call in it is no plain text.
        pattern = regex_of(bare)
        rules += [
            "start: TEXT | said calls",
            f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{pattern}(.|\\n)*/",
            f"said[suffix={json.dumps(bare)}]: /(.|\\n)*/",
        ]
    return Structure(grammar="\n".join(rules)).with_calls(form, functions)


def _function(tool: dict[str, Any], at: int) -> dict[str, Any]:
    found = tool.get("function", tool)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        raise ConfigError(f"tools.{at}: a tool is an object with a function that has a name")
    return found


def _call(form: CallForm, at: int, function: dict[str, Any]) -> list[str]:
    """The rules of a call of a function, which is `call_{at}`."""
    parameters, name = _parameters(function), json.dumps(function["name"])
    if form.kind == "marked":
        return [f"call_{at}: {name} begin_{at}_0", *marked_rules(form, at, parameters, f"tools: {function['name']!r}")]
    if form.kind == "object":
        return [f"call_{at}: %json {json.dumps(_schema(form, function['name'], parameters))}"]
    said = said_of(form, form.joined[0])
    if form.numbered:
        said += f" /[a-zA-Z0-9]{{9}}/ {said_of(form, form.joined[1])}"
    return [f"call_{at}: {name} {said} %json {json.dumps({**parameters, 'x-guidance': WAYS})}"]


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, made ready."""
    asked = function.get("parameters") or {"type": "object", "properties": {}}
    try:
        parameters = prepare(asked)
    except ConfigError as err:
        raise ConfigError(f"tools: the parameters of {function['name']!r}: {err}") from None
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise ConfigError(f"tools: the parameters of {function['name']!r} are no object; wrap them in one")
    return {"type": "object", **parameters}


def _schema(form: CallForm, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Of a whole call that is an object. What its parameters point to within themselves is moved along."""
    numbered = {"id": {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}} if form.numbered else {}
    return {
        "type": "object",
        "properties": {
            "name": {"const": name},
            form.arguments: moved(parameters, f"#/properties/{form.arguments}"),
            **numbered,
        },
        "required": ["name", form.arguments, *numbered],
        "additionalProperties": False,
        "x-guidance": WAYS,
    }
