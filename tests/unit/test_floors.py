"""The house keeps its floors: a module imports from floors below its own, or from its own folder."""

import ast
from collections.abc import Iterator
from pathlib import Path

FLOORS = [
    ["core"],
    ["text", "metrics", "native"],
    ["data", "models"],
    ["engine"],
    ["training", "evals", "retrieval", "choice", "reporting"],
    ["verbs"],
    ["faces"],
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
SOURCE = Path(__file__).parents[2] / "src" / "luthier"


def imported(path: Path) -> Iterator[str]:
    """Dotted names of every luthier module that `path` imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_down():
    climbing = []
    for path in sorted(SOURCE.rglob("*.py")):
        here = path.relative_to(SOURCE).parts
        if len(here) == 1:
            continue  # the roof sees everything
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "luthier" or len(parts) < 2 or parts[1] not in LEVEL:
                continue
            if parts[1] != here[0] and LEVEL[parts[1]] >= LEVEL[here[0]]:
                climbing.append(f"{'/'.join(here)} imports luthier.{parts[1]}")
    assert climbing == []


def test_every_folder_has_a_floor():
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert folders <= set(LEVEL), f"no floor for {folders - set(LEVEL)}"
