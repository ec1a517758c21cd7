"""luthier report"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.faces.cli.flags import Parser, make_parser


def parser() -> Parser:
    made = make_parser("report", "Write a run's page anew from its files.")
    made.add_argument("run", help="run:ID, run:last, or the run's directory")
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    from luthier.verbs.report import Report, report

    print(report(Report(run=found.run)))
    return 0
