"""luthier serve"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from luthier.core.errors import ConfigError
from luthier.faces.cli.chinese import say
from luthier.faces.cli.flags import Parser, add_fields, make_parser, read_fields
from luthier.faces.server.keys import SCOPES, add_key
from luthier.faces.server.settings import Serve


def parser() -> Parser:
    made = make_parser("serve", "Serve models on this machine, in the words of OpenAI's API.")
    made.add_argument("models", nargs="*", metavar="MODEL", help="what to serve; NAME=MODEL gives it another name")
    made.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    made.add_argument("--new-key", metavar="NAME", help="make a key, put it into the file of --keys, and end")
    made.add_argument("--scopes", default="infer", metavar="A,B", help=f"what it may do: {', '.join(SCOPES)}")
    add_fields(made, Serve, skip=("models",))
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    if found.new_key is not None:
        if found.keys is None:
            raise ConfigError("--new-key: say with --keys FILE where it belongs")
        print(add_key(Path(found.keys), found.new_key, found.scopes.split(",")))
        print(say("Keep it: it is shown this once, and the file holds its hash alone."), file=sys.stderr)
        return 0
    models = {"models": tuple(found.models)} if found.models else {}
    settings = read_fields(found, Serve, file=found.config, skip=("models",), **models).config
    from luthier.faces.server.serving import serve

    return serve(settings, lambda text: print(say(text), file=sys.stderr, flush=True))
