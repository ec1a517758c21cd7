"""luthier tune"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.config import parse_scalar
from luthier.core.errors import ConfigError, LuthierError
from luthier.faces.cli.chinese import say
from luthier.faces.cli.flags import Parser, add_fields, make_parser, read_fields
from luthier.faces.cli.progress import show_progress
from luthier.faces.cli.results import print_json, print_record


def parser() -> Parser:
    from luthier.verbs.tune import Tune

    made = make_parser("tune", "Tune a model on data, and judge it beside plain baselines.")
    made.add_argument("file", nargs="?", help="a YAML file of settings; flags go before it")
    add_fields(made, Tune)
    made.add_argument("--resume", metavar="RUN", help="go on with an interrupted run: run:ID")
    made.add_argument("--dry-run", action="store_true", help="decide everything, print it, and stop")
    made.add_argument("--json", action="store_true", help="print the record as JSON")
    return made


def run(arguments: Sequence[str]) -> int:
    from luthier.verbs.launch import follows

    if not follows():
        return _run(arguments)
    try:
        return _run(arguments)
    except LuthierError as err:
        return err.exit_code  # the first process says why
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    from luthier.verbs.launch import follows
    from luthier.verbs.tune import Tune, plan, tune

    if found.resume:
        given = [name for name in Tune.model_fields if name != "processes" and getattr(found, name, None) is not None]
        if given or found.file or found.set:
            raise ConfigError("--resume goes on with the run exactly as it was asked for; give no other settings")
    with show_progress(quiet=follows()) as sinks:
        if found.resume:
            more = {} if found.processes is None else {"processes": parse_scalar(found.processes)}
            record = tune(resume=found.resume, sinks=sinks, **more)
        else:
            if (
                found.file is None
                and found.data is None
                and not any(one.startswith("data.train=") for one in found.set)
            ):
                raise ConfigError("tune needs a YAML file, or at least --data; luthier tune --help says more")
            asked = read_fields(found, Tune, file=found.file)
            if found.dry_run and follows():
                return 0
            if found.dry_run:
                print_json(plan(asked, sinks=sinks))
                return 0
            record = tune(asked, sinks=sinks)
    if follows():
        return 0
    print_record(record, as_json=found.json)
    if not found.json:
        one, many = f'generate run:{record.id} "some text"', f"evaluate run:{record.id} --data FILE"
        print(say(f"Next: luthier {one}   or: luthier {many}"))
    return 0
