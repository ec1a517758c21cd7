"""luthier runs"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from luthier.core.run import list_runs, read_record, runs_root
from luthier.faces.cli.chinese import pad, say
from luthier.faces.cli.flags import Parser, make_parser
from luthier.faces.cli.progress import say_time
from luthier.faces.cli.results import SHOWN, print_json


def parser() -> Parser:
    made = make_parser("runs", "Every run, oldest first, with its main result.")
    made.add_argument("--json", action="store_true", help="print the records as JSON")
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    records = [read_record(path) for path in list_runs()]
    if found.json:
        print_json([record.model_dump(mode="json") for record in records])
        return 0
    if not records:
        print(say(f"no runs in {runs_root()} yet; `luthier quickstart` or `luthier tune` makes one"))
        return 0
    width = max(len(record.id) for record in records) + 6
    for record in records:
        name = next((name for name in SHOWN if name in record.metrics), None)
        result = f"{name} {record.metrics[name]}" if name else "-"
        age = (datetime.now(UTC) - datetime.fromisoformat(record.created)).total_seconds() if record.created else 0
        model = record.lineage.get("model", "-")
        state, since = pad(say(record.state), 13), pad(say(f"{say_time(age)} ago"), 14)
        print(f"{'run:' + record.id:<{width}}{state}{since}{model:<24}{result}")
    return 0
