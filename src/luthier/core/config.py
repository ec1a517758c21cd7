"""Strict, frozen, documented settings. A typo is an error with a suggestion; every value knows where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from luthier.core.errors import ConfigError, did_you_mean

Origin: TypeAlias = Literal["default", "advised", "file", "override"]


class Config(BaseModel):
    """What somebody asked for: immutable, unknown keys forbidden, each field documented by the string below it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @classmethod
    def make(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """Validate `values`; raises ConfigError that lists every mistake at once, each with its path."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as err:
            raise ConfigError(
                join_mistakes(where, [explain_mistake(cls, mistake) for mistake in err.errors()])
            ) from None


def join_mistakes(where: str, mistakes: Sequence[str]) -> str:
    """`where: mistake`, or one indented line for each when there are several."""
    return f"{where}: {mistakes[0]}" if len(mistakes) == 1 else f"{where}:" + "".join(f"\n  {one}" for one in mistakes)


C = TypeVar("C", bound=Config)


@dataclass(frozen=True, slots=True)
class Resolved(Generic[C]):
    """A Config beside the origin of every value that somebody chose; a path not in `origins` is a default."""

    config: C
    origins: dict[str, Origin] = field(default_factory=dict)

    def origin(self, path: str) -> Origin:
        """Where the value at dotted `path` came from: its own entry, or that of the nearest parent."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            found = self.origins.get(".".join(parts[:end]))
            if found:
                return found
        return "default"

    def advise(self, **values: Any) -> Resolved[C]:
        """A copy with top-level `values` filled in by advice, and recorded as such."""
        config = type(self.config).make({**_fields(self.config), **values}, where="advice")
        return Resolved(config, {**self.origins, **dict.fromkeys(values, "advised")})

    def rows(self) -> Iterator[tuple[str, Any, Origin]]:
        """(path, value, origin) of every leaf, in the order of the fields: what `resolved.yaml` holds."""
        for path, value in flatten(self.config.model_dump(mode="json")):
            yield path, value, self.origin(path)


def resolve(
    cls: type[C],
    *,
    file: str | Path | None = None,
    values: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Resolved[C]:
    """Read `file` (YAML), lay `values` (flags, keyword arguments) and `overrides` ("a.b=c") over it, and validate.

    Order: defaults < file < values and overrides. Raises ConfigError for an unreadable file, broken YAML, an
    override that is not key=value, and every invalid setting, all at once.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    lines: dict[str, int] = {}
    if file is not None:
        tree, lines = read_yaml(file)
        origins.update({path: "file" for path, _ in flatten(tree)})
    for key, value in (values or {}).items():
        tree[key] = value
        origins = {path: origin for path, origin in origins.items() if path != key and not path.startswith(key + ".")}
        origins[key] = "override"
    for item in overrides:
        path, value = _parse_override(item)
        head, _, rest = path.partition(".")
        default = cls.model_fields[head].default if head in cls.model_fields else None
        if rest and head not in tree and isinstance(default, str) and default != "auto":
            tree[head] = default  # `--set adapter.rank=8` means the adapter that is the default
        _put(tree, path, value)
        origins[path] = "override"
    where = str(file) if file is not None else cls.__name__.lower()
    try:
        config = cls.model_validate(tree)
    except ValidationError as err:
        mistakes = []
        for mistake in err.errors():
            line = _line_of(mistake["loc"], lines)
            mistakes.append((f"line {line}: " if line else "") + explain_mistake(cls, mistake))
        raise ConfigError(join_mistakes(where, mistakes)) from None
    return Resolved(config, origins)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line (from 1) of each dotted key. Duplicate keys are errors."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; write one, or pass --model and --data instead") from None
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot be read ({err})") from None
    lines: dict[str, int] = {}

    def visit(node: yaml.Node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in lines:
                raise ConfigError(
                    f"{path}: line {key.start_mark.line + 1}: {name} is set twice (first on line {lines[name]})"
                )
            lines[name] = key.start_mark.line + 1
            visit(value, name + ".")

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            visit(node, "")
        tree = yaml.safe_load(text)
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        at = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{path}: {at}not valid YAML ({getattr(err, 'problem', err)})") from None
    if tree is None:
        raise ConfigError(f"{path}: the file is empty; it needs at least `model:` and `data:`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, found a {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}, lines


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of a nested mapping; an empty mapping is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def explain_mistake(cls: type[BaseModel], mistake: ErrorDetails) -> str:
    """One validation error as a sentence: the path, what is wrong, and the nearest right name or the value given."""
    path = ".".join(str(part) for part in mistake["loc"] if not _is_branch(part))
    if mistake["type"] == "extra_forbidden":
        owner = _owner(cls, mistake["loc"][:-1])
        return f"{path}: no such setting; {did_you_mean(str(mistake['loc'][-1]), owner.model_fields)}"
    if mistake["type"] == "missing":
        return f"{path}: is required"
    cause = mistake.get("ctx", {}).get("error")
    if cause is not None:
        return f"{path}: {cause}" if path else str(cause)
    return f"{path}: {mistake['msg'][:1].lower()}{mistake['msg'][1:]} (got {mistake['input']!r})"


def _is_branch(part: int | str) -> bool:
    # Union branches appear in a pydantic path under the type's name, such as "str" or "list[str]": noise to a reader.
    if not isinstance(part, str):
        return False
    plain = part.removeprefix("constrained-")
    return plain in {"str", "int", "float", "bool"} or "[" in part or part[:1].isupper()


def _owner(cls: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    owner = cls
    for part in path:
        inner = owner.model_fields[str(part)].annotation if str(part) in owner.model_fields else None
        for candidate in (inner, *getattr(inner, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                owner = candidate
                break
    return owner


def _line_of(loc: Sequence[int | str], lines: Mapping[str, int]) -> int | None:
    parts = [str(part) for part in loc if not _is_branch(part)]
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in lines:
            return lines[".".join(parts[:end])]
    return None


def _parse_override(item: str) -> tuple[str, Any]:
    import yaml

    path, sep, text = item.partition("=")
    if not sep or not path.strip():
        raise ConfigError(f"--set {item!r}: write it as key=value, for instance --set adapter.rank=8")
    try:
        return path.strip(), parse_scalar(yaml.safe_load(text))
    except yaml.YAMLError:
        return path.strip(), text


def parse_scalar(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value) if any(mark in value for mark in "eE.") else value
        except ValueError:
            return value
    return value


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    node = tree
    for key in parents:
        inner = node.get(key)
        node[key] = dict(inner) if isinstance(inner, Mapping) else ({"kind": inner} if isinstance(inner, str) else {})
        node = node[key]
    node[leaf] = value


def _fields(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in type(config).model_fields}
