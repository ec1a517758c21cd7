"""The command line. `luthier --help` answers at once: nothing heavy is imported before a command is known."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from luthier.faces.cli.chinese import say

HELP = """luthier: one workshop for the whole life of a fine-tuned language model

  luthier quickstart                 the whole way once, on shipped data
  luthier tune run.yaml              tune a model (or: --model M --data D --objective classify)
  luthier evaluate MODEL --data D    judge a model on held-out rows
  luthier generate MODEL "text"      answer one text, a file (--input, --output) or a pipe
  luthier chat MODEL                 talk to a model
  luthier serve MODEL                OpenAI's API, on this machine
  luthier index DOCS --name NAME     documents to answer from: chat MODEL --index NAME
  luthier prepare show DATA          rows as the model sees them;  luthier prepare profile DATA
  luthier merge run:ID --output DIR  fold an adapter into its base: a whole model
  luthier report run:ID              write a run's page anew
  luthier runs                       every run and its main result
  luthier doctor                     what this machine has, and what is missing
  luthier schema VERB                every setting of a verb, as JSON schema

MODEL is a shipped model (mini), a hub id, a directory, or run:ID (run:last is the newest).
luthier COMMAND --help says more. Runs live in ./runs, or where LUTHIER_RUNS says.
"""

COMMANDS = {
    "tune": "luthier.faces.cli.tune",
    "evaluate": "luthier.faces.cli.evaluate",
    "generate": "luthier.faces.cli.generate",
    "chat": "luthier.faces.cli.chat",
    "serve": "luthier.faces.cli.serve",
    "index": "luthier.faces.cli.index",
    "prepare": "luthier.faces.cli.prepare",
    "merge": "luthier.faces.cli.merge",
    "report": "luthier.faces.cli.report",
    "runs": "luthier.faces.cli.runs",
    "doctor": "luthier.faces.cli.doctor",
    "schema": "luthier.faces.cli.schema",
    "quickstart": "luthier.faces.cli.quickstart",
}
# Those that run a model.
WORKING = {"tune", "evaluate", "generate", "chat", "index", "merge", "quickstart"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a refused request, 3 for stopped training, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(say(HELP), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        from luthier import __version__

        print(f"luthier {__version__}")
        return 0
    from importlib import import_module

    from luthier.core.errors import LuthierError, did_you_mean

    name, *rest = arguments
    try:
        if name not in COMMANDS:
            print(say(f"luthier: there is no command {name!r}; {did_you_mean(name, COMMANDS)}"), file=sys.stderr)
            return 2
        if argv is None and name in WORKING and not {"-h", "--help"} & set(rest) and not _shares(name):
            from luthier.models.lean import import_lean

            import_lean()  # the process is ours alone
        code = import_module(COMMANDS[name]).run(rest)
        sys.stdout.flush()
        return int(code)
    except LuthierError as err:
        print(f"luthier: {say(err)}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt as err:
        print(say(f"\nluthier: stopped{'; ' + str(err) if str(err) else ''}"), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away; say nothing, and keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as err:
        if os.environ.get("LUTHIER_DEBUG"):
            raise
        if _is_out_of_memory(err):
            print(
                say(
                    "luthier: memory ran out; set a shorter max_length or a smaller batch_size, hold the model in less "
                    "(quantize: nf4), or choose a smaller model or a machine with more memory"
                ),
                file=sys.stderr,
            )
            return 2
        print(
            say(
                f"luthier: this is a bug in Luthier: {type(err).__name__}: {err}\n"
                "Set LUTHIER_DEBUG=1 to see where, and please report it."
            ),
            file=sys.stderr,
        )
        return 1


def _is_out_of_memory(err: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(err, MemoryError)
    from luthier.models.memory import out_of_memory

    return out_of_memory(err)


def _shares(name: str) -> bool:
    """Whether the model may be shared out over processes, which transformers can do only where it was imported whole."""
    from luthier.verbs.launch import is_started

    return name == "generate" and is_started()


if __name__ == "__main__":
    raise SystemExit(main())
