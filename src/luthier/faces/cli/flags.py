"""Command-line flags made from a verb's Config: one flag a field, and --set for what lies deeper."""

from __future__ import annotations

import argparse
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from luthier.core.config import Config, Resolved, parse_scalar, resolve
from luthier.core.errors import ConfigError, did_you_mean

C = TypeVar("C", bound=Config)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: an unknown flag is met with the nearest known one."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            f"{self.prog.removeprefix('luthier ')}: {message}; luthier {self.prog.split()[-1]} --help lists the flags"
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        found, unknown = self.parse_known_args(
            _spell_out(arguments) if "--set" in self._option_string_actions else arguments
        )
        flags = [one.split("=")[0] for one in unknown if one.startswith("-")]
        if flags:
            known = [option for action in self._actions for option in action.option_strings]
            raise ConfigError(f"there is no flag {flags[0]}; {did_you_mean(flags[0], known)}")
        if unknown:
            raise ConfigError(f"{unknown[0]!r} is one argument too many")
        return found


def _spell_out(arguments: Sequence[str]) -> list[str]:
    """`--data.train VALUE` and `--data.train=VALUE` as `--set data.train=VALUE`."""
    spelt: list[str] = []
    rest = iter(arguments)
    for one in rest:
        if one == "--":
            return [*spelt, one, *rest]
        flag, given, value = one.partition("=")
        if flag.startswith("--") and "." in flag:
            path = flag.removeprefix("--").replace("-", "_")
            written = value if given else next(rest, None)
            if written is None:
                raise ConfigError(f"{flag}: write a value after it")
            spelt += ["--set", f"{path}={written}"]
        else:
            spelt.append(one)
    return spelt


def make_parser(command: str, about: str) -> Parser:
    """A parser for `luthier COMMAND`; abbreviated flags are refused, for they break when a flag is added."""
    return Parser(prog=f"luthier {command}", description=about, allow_abbrev=False)


def add_fields(parser: Parser, config: type[Config], skip: Sequence[str] = ()) -> None:
    """A --kebab-case flag for each field of `config`, its help the field's own words; and --set for nested settings."""
    group = parser.add_argument_group("settings (all of them: luthier schema)")
    for name, field in config.model_fields.items():
        if name in skip:
            continue
        flag = "--" + name.replace("_", "-")
        text = (field.description or "").replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "default": None, "help": text}
        if _is_bool(field.annotation):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif name == "data":
            group.add_argument(
                flag, metavar="VALUE", action="append", **{**options, "help": text + " Given again: one more source."}
            )
        else:
            group.add_argument(flag, metavar=_metavar(field.annotation), **options)
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting by its path, such as adapter.rank=8",
    )


def add_structure(parser: Parser) -> None:
    """Flags for the form of an answer. Their values are taken as they stand, where --set would read them as YAML."""
    parser.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that satisfies this schema")
    parser.add_argument("--regex", metavar="TEXT", help="the whole answer matches this regular expression")
    parser.add_argument(
        "--choice", action="append", dest="choices", metavar="TEXT", help="the answer is one of these; may be repeated"
    )
    parser.add_argument("--grammar", metavar="FILE", help="the answer follows this Lark grammar")


def read_structure(found: argparse.Namespace) -> dict[str, Any]:
    """The setting `structure` of a parsed command line, if it is given."""
    given = {name: getattr(found, name) for name in ("json_schema", "regex", "choices", "grammar")}
    given = {name: value for name, value in given.items() if value is not None}
    if "grammar" in given:
        try:
            given["grammar"] = Path(given["grammar"]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(
                f"--grammar {given['grammar']}: cannot be read ({err}); give a file of Lark rules"
            ) from None
    return {"structure": given} if given else {}


def read_fields(
    found: argparse.Namespace, config: type[C], *, file: str | None = None, skip: Sequence[str] = (), **values: Any
) -> Resolved[C]:
    """The resolved config of a parsed command line: file, then flags, then --set."""
    for name in config.model_fields:
        value = None if name in skip else getattr(found, name, None)
        if isinstance(value, list):
            value = value[0] if len(value) == 1 else {"train": value}
        if value is not None and values.get(name) is None:
            values[name] = parse_scalar(value)
    given = {name: value for name, value in values.items() if value is not None}
    # `--data D --set data.split.test=0.2` means more about the same data.
    for item in found.set:
        head = item.partition(".")[0]
        if "." in item.partition("=")[0] and isinstance(given.get(head), str) and head == "data":
            given[head] = {"train": given[head]}
    if file is not None and isinstance(given.get("data"), str):
        given["data"] = {"train": given["data"]}
    return resolve(config, file=file, values=given, overrides=found.set)


def _is_bool(annotation: object) -> bool:
    return annotation is bool


def _metavar(annotation: object) -> str:
    """What kind of value a flag takes, in a word."""
    if get_origin(annotation) is Annotated:
        return _metavar(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return "|".join(dict.fromkeys(_metavar(one) for one in get_args(annotation) if one is not type(None)))
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    return "N" if annotation is int else "X" if annotation is float else "VALUE"
