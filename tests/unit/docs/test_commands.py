"""Every `luthier` command in the READMEs and docs has flags that exist; every Python block compiles; YAML resolves."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from luthier.core.config import resolve
from luthier.faces.cli.main import COMMANDS
from luthier.verbs.tune import Tune

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for number, (kind, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            if kind == language:
                found.append(pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}"))
    return found


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_parse(text):
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r" (2?>\S*|>>?) ?\S*(?= |$)| &$", "", line), comments=True)
        if words[:1] != ["luthier"] or words[1:2] in ([], ["--help"]):
            continue
        assert words[1] in COMMANDS, line
        import_module(COMMANDS[words[1]]).parser().parse(words[2:])


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles(text):
    compile(text, "docs", "exec")


@pytest.mark.parametrize("text", blocks("yaml"))
def test_settings_resolve(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert resolve(Tune, file=path).config.model
