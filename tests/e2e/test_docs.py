"""Every bash and Python block of the quickstart, the tour, the guides and the READMEs, run page by page in an empty directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What it shows needs a server elsewhere; tests/unit/engine/test_remote.py has one of its own.
ELSEWHERE = "backend.md"
GUIDES = [path for path in sorted((ROOT / "docs" / "guides").glob("*.md")) if path.name != ELSEWHERE]
PAGES = [ROOT / "docs" / "quickstart.md", ROOT / "docs" / "tour.md", *GUIDES]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.e2e


def run_block(kind: str, text: str, folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "LUTHIER_RUNS": str(folder / "runs"), "HF_HUB_OFFLINE": "1"}
    command = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{text}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    for kind, text in blocks:
        run_block(kind, text, tmp_path)


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_five_lines_of_the_readme(name, tmp_path):
    text = next(text for kind, text in BLOCK.findall((ROOT / name).read_text(encoding="utf-8")) if kind == "python")
    environment = {**os.environ, "LUTHIER_RUNS": str(tmp_path / "runs"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip(), "the answer is empty"
