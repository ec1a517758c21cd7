"""Settings: strict, all mistakes at once, each with an exit; every value knows its origin."""

from pathlib import Path
from typing import ClassVar

import pytest

from luthier.core.catalog import Catalog, Part
from luthier.core.config import Config, flatten, resolve
from luthier.core.errors import ConfigError


class Inner(Config):
    path: str
    """Where."""
    rows: int = 3
    """How many."""


class Shape(Part):
    """A shape."""

    kind: ClassVar[str] = "shape"


class Circle(Shape):
    """Round."""

    kind: ClassVar[str] = "circle"
    radius: float = 1.0
    """Half across."""


SHAPES: Catalog[Shape] = Catalog("shape", {"circle": f"{__name__}:Circle", "liar": f"{__name__}:Circle"}, __name__)


class Asked(Config):
    model: str
    """Which."""
    data: Inner
    """What."""
    rate: float = 0.1
    """How fast."""
    shape: SHAPES.field = "circle"
    """Of what form."""


GOOD = "model: m\ndata:\n  path: a.jsonl\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_mistake_is_reported_at_once_with_line_and_suggestion(tmp_path):
    path = write(tmp_path, "modle: m\ndata:\n  pth: a\n  rows: many\nrate: fast\n")
    with pytest.raises(ConfigError) as caught:
        resolve(Asked, file=path)
    message = str(caught.value)
    for part in ("line 1: modle: no such setting; did you mean 'model'?", "model: is required", "did you mean 'path'?"):
        assert part in message
    assert "line 4: data.rows" in message and "line 5: rate" in message and "data.path: is required" in message


def test_origins(tmp_path):
    asked = resolve(Asked, file=write(tmp_path, GOOD), overrides=["data.rows=7", "shape.radius=2.5"])
    origins = {path: origin for path, _, origin in asked.rows()}
    assert origins["model"] == "file" and origins["data.path"] == "file"
    assert origins["data.rows"] == "override" and origins["shape.radius"] == "override"
    assert origins["rate"] == "default"
    assert asked.config.data.rows == 7 and asked.config.shape.radius == 2.5
    advised = asked.advise(rate=0.5)
    assert advised.config.rate == 0.5 and advised.origin("rate") == "advised"
    assert advised.config.data == asked.config.data


def test_values_replace_what_the_file_said(tmp_path):
    asked = resolve(Asked, file=write(tmp_path, GOOD), values={"data": {"path": "b"}})
    assert asked.config.data.path == "b" and asked.origin("data.path") == "override"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "expected `key: value`"),
        ("model: [1\n", "not valid YAML"),
        ("model: a\nmodel: b\n", "line 2: model is set twice (first on line 1)"),
        ("model: m\ndata:\n  path: a\nrate: .nan\n", "rate"),
    ],
)
def test_bad_files(tmp_path, text, part):
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        resolve(Asked, file=write(tmp_path, text))
    assert part in str(caught.value)


def test_missing_file_names_the_way_out():
    with pytest.raises(ConfigError, match="no such file"):
        resolve(Asked, file="nowhere.yaml")


def test_override_without_a_sign():
    with pytest.raises(ConfigError, match="key=value"):
        resolve(Asked, values={"model": "m", "data": {"path": "a"}}, overrides=["rate"])


def test_small_numbers_in_overrides_are_numbers():
    asked = resolve(Asked, values={"model": "m", "data": {"path": "a"}}, overrides=["rate=1e-4"])
    assert asked.config.rate == 1e-4


def test_configs_are_frozen_and_round_trip():
    asked = Asked.make({"model": "m", "data": {"path": "a"}, "shape": {"kind": "circle", "radius": 3}})
    with pytest.raises(ValueError, match="frozen"):
        asked.rate = 2.0
    assert Asked.make(asked.model_dump()) == asked


def test_catalog_suggests_and_checks_names():
    with pytest.raises(ConfigError, match="did you mean 'circle'"):
        SHAPES.load("circel")
    with pytest.raises(ConfigError, match="calls itself 'circle' but is listed as 'liar'"):
        SHAPES.load("liar")
    with pytest.raises(ConfigError, match=r"radios: no such setting; did you mean 'radius'"):
        SHAPES.parse({"kind": "circle", "radios": 1})
    with pytest.raises(ConfigError, match="needs a `kind`"):
        SHAPES.parse({"radius": 1})


def test_flatten():
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": 2})) == {"a.b": 1, "a.c": {}, "d": 2}
