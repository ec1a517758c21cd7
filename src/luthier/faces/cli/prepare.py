"""luthier prepare"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from luthier.core.errors import ConfigError, did_you_mean
from luthier.core.events import Event
from luthier.faces.cli.chinese import say
from luthier.faces.cli.flags import Parser, add_fields, make_parser, read_fields
from luthier.faces.cli.progress import describe
from luthier.faces.cli.results import print_json

ACTIONS = ("show", "profile")
# Learned tokens stand on this colour; where there is none, between these marks.
COLOUR, PLAIN = "\033[30;48;5;179m", "\033[0m"


def parser() -> Parser:
    from luthier.verbs.prepare import Prepare

    made = make_parser(
        "prepare", "show: rows as the model sees them, coloured by what is learned. profile: the data as a whole."
    )
    made.add_argument("action", help="show or profile")
    made.add_argument("source", help="a file, a directory, sms_spam, or hub:owner/name")
    add_fields(made, Prepare, skip=("data",))
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    if found.action not in ACTIONS:
        raise ConfigError(f"prepare: there is no action {found.action!r}; {did_you_mean(found.action, ACTIONS)}")
    from luthier.verbs.prepare import Prepare, profile, show

    asked = read_fields(found, Prepare, skip=("data",), data=found.source)
    if found.action == "profile":
        print_json(profile(asked))
        return 0
    rows = show(asked, sinks=[_warn])
    if found.json:
        print_json(rows)
        return 0
    colour = sys.stdout.isatty()
    for row in rows:
        learned = sum(1 for _, weight in row["tokens"] if weight)
        gold = "" if row["gold"] is None else f", gold {row['gold']}"
        print(say(f"-- {row['id']}: {len(row['tokens'])} tokens, {learned} learned{gold}"))
        open_mark = False
        text = ""
        for piece, weight in row["tokens"]:
            if bool(weight) != open_mark:
                text += (COLOUR if colour else "⟦") if weight else (PLAIN if colour else "⟧")
                open_mark = bool(weight)
            text += piece
        print(text + ((PLAIN if colour else "⟧") if open_mark else ""))
    return 0


def _warn(event: Event) -> None:
    if event["event"] == "warning":
        print(describe(event), file=sys.stderr)
