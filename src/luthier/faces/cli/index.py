"""luthier index"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.run import runs_root
from luthier.faces.cli.chinese import say
from luthier.faces.cli.flags import Parser, add_fields, make_parser, read_fields
from luthier.faces.cli.progress import show_progress


def parser() -> Parser:
    from luthier.verbs.index import Index

    made = make_parser("index", "Index documents, so that chat and generate answer from them: --index NAME.")
    made.add_argument(
        "docs", nargs="+", help="directories and files: txt, md, html, pdf, and tables of questions and answers"
    )
    add_fields(made, Index, skip=("docs", "chunking", "columns"))
    made.add_argument("--json", action="store_true", help="print the record as JSON")
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    from luthier.verbs.index import Index, index

    with show_progress() as sinks:
        record = index(read_fields(found, Index, skip=("docs",), docs=tuple(found.docs)), sinks=sinks)
    if found.json:
        print(record.model_dump_json(indent=2))
        return 0
    numbers = record.numbers
    print(say(f"{numbers['files']} files, {numbers['passages']} passages ({numbers['embedded']} embedded now)"))
    print(
        say(
            f"{numbers['unchanged']} files unchanged, {numbers['removed']} removed, {len(numbers['left_out'])} left out"
        )
    )
    print(say(f"run:{record.id} is in {runs_root() / record.id}; next: luthier chat MODEL --index {record.id}"))
    return 0
