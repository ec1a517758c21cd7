"""luthier quickstart"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.faces.cli.chinese import say
from luthier.faces.cli.flags import Parser, make_parser
from luthier.faces.cli.progress import say_time, show_progress
from luthier.faces.cli.results import print_json, print_record


def parser() -> Parser:
    made = make_parser(
        "quickstart", "The whole way once: profile, tune, judge, use and report, on the shipped SMS spam data."
    )
    made.add_argument("--name", help="the run's name")
    made.add_argument("--json", action="store_true", help="print the record as JSON")
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    from luthier.verbs.quickstart import profile, quickstart

    if not found.json:
        facts = profile()
        labels = ", ".join(f"{count:,} {name}" for name, count in facts["labels"].items())
        print("SMS Spam Collection (Almeida and Gomez Hidalgo; UCI; CC BY 4.0)")
        half = facts["characters"]["median"]
        print(say(f"{facts['rows']:,} text messages: {labels}. Half are shorter than {half} characters."))
        repeated = facts["duplicates"]
        print(say(f"{repeated} rows repeat an earlier one; equal rows will stay on one side of the split."))
        print(flush=True)
    with show_progress() as sinks:
        record, said = quickstart(sinks=sinks, name=found.name)
    if found.json:
        print_json({"record": record.model_dump(mode="json"), "messages": [[one.input, one.output] for one in said]})
        return 0
    print_record(record, as_json=False)
    print()
    for one in said:
        share = (one.probabilities or {}).get(str(one.output), 0.0)
        print(f"  {one.output:<5} {share:>6.1%}  {one.input}")
    print(say(f"\nDone in {say_time(record.seconds)}. Try next:"))
    print(f'  luthier generate run:{record.id} "Your parcel is waiting, pay 2.99 here"')
    print(f"  luthier evaluate run:{record.id} --data FILE.jsonl")
    print("  luthier tune --model mini --data YOUR.jsonl")
    return 0
