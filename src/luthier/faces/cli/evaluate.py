"""luthier evaluate"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.faces.cli.flags import Parser, add_fields, make_parser, read_fields
from luthier.faces.cli.progress import show_progress
from luthier.faces.cli.results import print_record


def parser() -> Parser:
    from luthier.verbs.evaluate import Evaluate

    made = make_parser("evaluate", "Judge a model on held-out rows, every number with its interval.")
    made.add_argument("model", help="a shipped model, a hub id, a directory, or run:ID")
    add_fields(made, Evaluate, skip=("model",))
    made.add_argument("--json", action="store_true", help="print the record as JSON")
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    from luthier.verbs.evaluate import Evaluate, evaluate

    asked = read_fields(found, Evaluate, skip=("model",), model=found.model)
    with show_progress() as sinks:
        record = evaluate(asked, sinks=sinks)
    print_record(record, as_json=found.json)
    return 0
