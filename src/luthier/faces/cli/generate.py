"""luthier generate"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from luthier.faces.cli.chinese import say
from luthier.faces.cli.flags import Parser, add_fields, add_structure, make_parser, read_fields, read_structure
from luthier.faces.cli.progress import show_progress

SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "beams", "n", "seed", "logprobs",
)  # fmt: skip


def parser() -> Parser:
    from luthier.verbs.generate import Generate

    made = make_parser("generate", "Answer one text, a file of rows, or a pipe (one text a line).")
    made.add_argument("model", help="a shipped model, a hub id, a directory, or run:ID")
    made.add_argument("prompt", nargs="?", help="the text; without it and without --input, lines are read from stdin")
    add_fields(made, Generate, skip=("model", "prompt", "sampling"))
    for name in SAMPLING:
        made.add_argument(
            "--" + name.replace("_", "-"), dest=name, metavar="X", help=f"the same as --set sampling.{name}=X"
        )
    made.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text that ends the answer; may be repeated"
    )
    add_structure(made)
    return made


def run(arguments: Sequence[str]) -> int:
    from luthier.core.errors import LuthierError
    from luthier.verbs.launch import follows

    if not follows():
        return _run(arguments)
    try:
        return _run(arguments, silent=True)
    except LuthierError as err:
        return err.exit_code  # the first process says why
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str], *, silent: bool = False) -> int:
    """`silent`: another process speaks for this one, and reads what is piped in."""
    found = parser().parse(arguments)
    from luthier.core.config import parse_scalar
    from luthier.core.errors import ConfigError
    from luthier.verbs.generate import Generate, generate

    sampling: dict[str, Any] = {
        name: parse_scalar(getattr(found, name)) for name in SAMPLING if getattr(found, name) is not None
    }
    if found.stop:
        sampling["stop"] = found.stop
    sampling |= read_structure(found)
    values: dict[str, Any] = {"model": found.model, "prompt": found.prompt, "sampling": sampling or None}
    piped: list[str] = []
    if found.prompt is None and found.input is None:
        if not silent and sys.stdin.isatty():
            raise ConfigError(
                'there is nothing to run: give a text, --input FILE, or pipe lines in (echo "text" | luthier generate MODEL)'
            )
        piped = [] if silent else [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not piped and not silent:
            raise ConfigError("there is nothing to run: standard input is empty")
    asked = read_fields(found, Generate, skip=("model", "prompt", "sampling"), **values)
    config = asked.config
    if config.format == "text" and config.output is None and config.sampling.beyond_text not in (None, "n"):
        raise ConfigError(f"{config.sampling.beyond_text}: numbers do not stand in a text; add --format json")
    with show_progress(quiet=config.input is None or silent) as sinks:
        if config.prompt is None and config.input is None:
            from luthier.verbs.generate import answer_texts

            answers = answer_texts(config, piped, sinks=sinks)
        elif config.input is None and config.format == "text":
            said: list[str] = []

            def show(piece: str) -> None:
                said.append(piece)
                if not silent:
                    print(piece, end="", flush=True)

            answers = generate(asked, sinks=sinks, on_text=show)
            if silent:
                return 0
            if said:
                print()
                return 0
        else:
            answers = generate(asked, sinks=sinks)
    if silent:
        return 0
    if config.output is not None:
        print(say(f"{len(answers)} answers written to {config.output}"), file=sys.stderr)
        return 0
    for one in answers:
        print(
            _as_text(one)
            if config.format == "text"
            else json.dumps(one, ensure_ascii=False, indent=2 if config.format == "json" else None)
        )
    return 0


def _as_text(answer: dict[str, Any]) -> str:
    if "others" in answer:
        return "\n\n".join(map(_as_text, ({"output": answer["output"]}, *answer["others"])))
    output, shares = answer["output"], answer.get("probabilities")
    if answer.get("known"):
        from luthier.faces.cli.sources import show_rows

        return f"{output}\n{show_rows(answer['sources'])}"
    if isinstance(output, float):
        return f"{output:.4f}"
    if isinstance(output, tuple | list):
        return ", ".join(output) or "(none)"
    return f"{output}\t{shares[output]:.4f}" if shares else str(output)
