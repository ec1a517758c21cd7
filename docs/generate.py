"""Write the reference pages from the code: python docs/generate.py [--check]

One page for the verbs' settings, one for the parts of every catalog. With --check nothing is written, and the exit
code is 1 when a page differs from what the code says.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from luthier.core.catalog import Catalog
from luthier.core.config import Config

REFERENCE = Path(__file__).parent / "reference"
VERBS = (
    *("tune:Tune", "evaluate:Evaluate", "generate:Generate", "index:Index", "prepare:Prepare", "merge:Merge"),
    "report:Report",
)
CATALOGS = (
    "training.objectives:OBJECTIVES",
    "training.rewards:REWARDS",
    "training.losses:LOSSES",
    "training.optimizers:OPTIMIZERS",
    "training.schedules:SCHEDULES",
    "models.adapters:ADAPTERS",
    "metrics.scorers:SCORERS",
    "evals.baselines:BASELINES",
)
HEAD = "<!-- Generated from the code by `make docs`; edit the docstrings instead. -->\n\n"


def find(where: str):
    module, _, name = where.partition(":")
    return getattr(import_module(f"luthier.{module}"), name)


def table(config: type[Config]) -> str:
    """Settings of a Config as a Markdown table, in the order of the code."""
    properties = config.model_json_schema()["properties"] if config.model_fields else {}
    rows = ["| setting | default | what it is |", "| --- | --- | --- |"]
    for name, field in config.model_fields.items():
        default = "required" if field.is_required() else f"`{show(field.get_default(call_default_factory=True))}`"
        text = (field.description or properties.get(name, {}).get("description") or "").replace("\n", " ")
        rows.append(f"| `{name}` | {default} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) if len(rows) > 2 else "No settings."


def show(value: object) -> object:
    if isinstance(value, Config):
        return value.model_dump(mode="json", exclude_defaults=True) or "{}"
    return value


def describe(thing: type) -> str:
    return (thing.__doc__ or "").strip().replace("\n    ", "\n")


def verbs() -> str:
    pages = [HEAD + "# Verbs\n\nEvery setting of every verb; `luthier schema VERB` prints the same as JSON schema.\n"]
    for where in VERBS:
        config = find(f"verbs.{where}")
        pages.append(f"## {where.split(':')[0]}\n\n{describe(config)}\n\n{table(config)}\n")
        for name, field in config.model_fields.items():
            for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(inner, type) and issubclass(inner, Config) and inner is not config:
                    pages.append(f"### {where.split(':')[0]}: `{name}`\n\n{describe(inner)}\n\n{table(inner)}\n")
    return "\n".join(pages)


def parts() -> str:
    pages = [
        HEAD + "# Parts\n\nWhat can be swapped, by catalog. Write a name, or a mapping with `kind` and its settings.\n"
    ]
    for where in CATALOGS:
        catalog: Catalog = find(where)
        pages.append(f"## {catalog.noun}\n")
        for name in catalog.names():
            part = catalog.load(name)
            pages.append(f"### `{name}`\n\n{describe(part)}\n\n{table(part)}\n")
    return "\n".join(pages)


def main() -> int:
    pages = {"verbs.md": verbs(), "parts.md": parts()}
    stale = []
    for name, text in pages.items():
        path = REFERENCE / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                REFERENCE.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'stale' if '--check' in sys.argv else 'written'}: {', '.join(stale)}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    raise SystemExit(main())
