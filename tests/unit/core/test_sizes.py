"""Memory as people write it: with its unit, or in GB."""

import pytest

from luthier.core.config import resolve
from luthier.core.errors import ConfigError
from luthier.verbs.tune import Tune

GIVEN = {"model": "mini", "data": "rows.jsonl"}


@pytest.mark.parametrize(
    ("said", "gigabytes"),
    [
        ("0.3GB", 0.3),
        ("0.3", 0.3),
        ("2", 2),
        ("300 mb", 0.3),
        ("1GiB", 2**30 / 1e9),
        ("512MiB", 2**29 / 1e9),
        ("auto", "auto"),
    ],
)
def test_memory_is_read_with_its_unit(said, gigabytes, tmp_path):
    assert resolve(Tune, values=GIVEN, overrides=[f"memory={said}"]).config.memory == pytest.approx(gigabytes)
    (tmp_path / "a.yaml").write_text(f"model: mini\ndata: rows.jsonl\nmemory: {said}\n")
    assert resolve(Tune, file=tmp_path / "a.yaml").config.memory == pytest.approx(gigabytes)


@pytest.mark.parametrize("said", ["0.3TB", "much", "3 4GB", "GB"])
def test_what_is_no_size_is_told_the_units(said):
    with pytest.raises(ConfigError) as refused:
        resolve(Tune, values=GIVEN, overrides=[f"memory={said}"])
    assert str(refused.value).count("memory:") == 1 and "GB, GiB, MB or MiB" in str(refused.value)


def test_no_memory_is_no_size():
    with pytest.raises(ConfigError, match="greater than 0"):
        resolve(Tune, values=GIVEN, overrides=["memory=0GB"])
