"""luthier merge"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.faces.cli.flags import Parser, add_fields, make_parser, read_fields
from luthier.faces.cli.progress import show_progress
from luthier.faces.cli.results import print_json


def parser() -> Parser:
    from luthier.verbs.merge import Merge

    made = make_parser(
        "merge", "Fold an adapter into its base, in full precision, and check that it computes the same."
    )
    made.add_argument("source", help="run:ID of a tuning with an adapter, or a directory with a PEFT adapter")
    add_fields(made, Merge, skip=("model",))
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    from luthier.verbs.merge import Merge, merge

    with show_progress() as sinks:
        made = merge(read_fields(found, Merge, skip=("model",), model=found.source), sinks=sinks)
    print_json(made)
    return 0
