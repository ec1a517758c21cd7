"""luthier chat"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import Field, model_validator

from luthier.core.config import Config, resolve
from luthier.core.errors import LuthierError, ModelError, did_you_mean
from luthier.core.events import Events
from luthier.core.types import Message
from luthier.engine.backend import Backend, refuse_here
from luthier.engine.sampling import Execution, Sampling
from luthier.faces.cli.chinese import say
from luthier.faces.cli.flags import Parser, add_structure, make_parser, read_structure
from luthier.faces.cli.progress import show_progress

if TYPE_CHECKING:
    from luthier.retrieval.prompt import Source
    from luthier.verbs.grounding import Prompt

# Tokens of a talk that are kept at most.
ROOM = 32768
COMMANDS = ("/help", "/reset", "/undo", "/system", "/save", "/sources", "/quit")
HELP = """/system TEXT  set the system message     /undo  take back the last turn
/reset        start over                 /save FILE  write the conversation as a messages line
/quit         leave (or Ctrl-D)          /sources    the passages of the last answer (with --index)"""


class Chat(Config):
    """How a talk goes."""

    sampling: Sampling = Sampling()
    execution: Execution = "auto"
    draft: str | None = None
    backend: Backend | None = None
    index: str | None = None
    passages: int = Field(5, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Chat:
        if self.backend is not None:
            refuse_here("auto", self.execution, self.draft)
        if self.index is not None and self.sampling.structure is not None:
            raise ValueError("answers from an index are text with citations; leave structure or index out")
        return self


def parser() -> Parser:
    made = make_parser("chat", "Talk to a model. Commands while talking: /help.")
    made.add_argument("model", help="a shipped model, a hub id, a directory, or run:ID")
    made.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    made.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens of one answer")
    made.add_argument("--temperature", type=float, default=0.7, metavar="X", help="0: always the likeliest token")
    made.add_argument("--top-p", type=float, metavar="X", help="draw among the likeliest tokens that hold this share")
    made.add_argument("--seed", type=int, metavar="N", help="seed of the draw")
    made.add_argument(
        "--execution",
        default="auto",
        choices=get_args(Execution),
        help="how the model is read (luthier schema generate)",
    )
    made.add_argument(
        "--draft", metavar="MODEL", help="a smaller model with the same tokenizer that guesses what comes next"
    )
    add_structure(made)
    made.add_argument(
        "--index", metavar="NAME", help="answer from this index, as luthier index makes one, with sources"
    )
    made.add_argument("--passages", type=int, default=5, metavar="N", help="most passages of the index that are read")
    made.add_argument("--backend", metavar="URL", help="a server that writes in place of this machine")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting such as backend.model=NAME"
    )
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    from luthier.engine.engine import Engine
    from luthier.engine.generate import room_for, stream, uses_engine
    from luthier.engine.loading import load_stored, settle_model, take_draft
    from luthier.engine.remote import load_served

    settings: dict[str, Any] = {"max_tokens": found.max_tokens, "temperature": found.temperature}
    settings |= {name: getattr(found, name) for name in ("top_p", "seed") if getattr(found, name) is not None}
    values = {"sampling": settings | read_structure(found), "execution": found.execution}
    values |= {name: getattr(found, name) for name in ("draft", "backend", "index") if getattr(found, name) is not None}
    values["passages"] = found.passages
    config = resolve(Chat, values=values, overrides=found.set).config
    sampling, people = config.sampling, sys.stdin.isatty()
    if config.index is not None:
        from luthier.faces.cli.sources import show_passages, show_sources
        from luthier.retrieval.citations import stream_checked
        from luthier.retrieval.prompt import say_unknown
        from luthier.verbs.grounding import Grounded
    with show_progress(quiet=not people) as sinks:
        events = Events(sinks=sinks)
        if config.backend is not None:
            model = load_served(found.model, config.backend, events=events)
        else:
            model = load_stored(found.model, config.execution, events)
        if model.spec.task != "causal":
            raise ModelError(
                f"{found.model}: this model is made to {model.spec.task} and cannot talk; "
                f'try luthier generate {found.model} "text"'
            )
        if config.backend is None:
            settle_model(model, config.execution, events, sampling=sampling)
            if config.draft is not None:
                take_draft(model, config.draft, config.execution, events)
        grounded = Grounded(config.index, config.passages, events=events) if config.index else None
    sources: tuple[Source, ...] = ()
    # Kept from turn to turn, so that what was said before is not read again.
    limit = model.spec.max_length
    engine = Engine(model, min(room_for(model, [limit], limit, 1), ROOM)) if uses_engine(model) else None
    system = [Message("system", found.system)] if found.system else []
    turns: list[Message] = []
    if people:
        print(say(f"{found.model}. /help for commands."))
    while True:
        try:
            line = input("> " if people else "").strip()
        except EOFError:
            return 0
        if not line:
            continue
        if line.startswith("/"):
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return 0
            if command == "/reset":
                turns, sources = [], ()
            elif command == "/sources":
                unsaid = say("the last answer has no passages; --index names what is answered from")
                print(show_passages(sources) if sources else unsaid)
            elif command == "/undo":
                turns = turns[:-2]
            elif command == "/system":
                system = [Message("system", rest)] if rest else []
            elif command == "/save":
                _save(Path(rest or "chat.jsonl"), [*system, *turns])
            else:
                print(say(HELP if command == "/help" else f"no command {command}; {did_you_mean(command, COMMANDS)}"))
            continue
        said: list[str] = []
        asked: Prompt = (*system, *turns, Message("user", line))
        try:
            if grounded is not None:
                found_there = grounded.look_up([asked])[0]
                sources = found_there.sources
                if not found_there.known:
                    said = [say_unknown(line)]
                    print(said[0])
                    turns += [Message("user", line), Message("assistant", said[0])]
                    continue
                asked, sources = grounded.ask(model, asked, found_there, sampling.max_tokens)
            written = stream(model, asked, sampling, engine=engine)
            for piece in keep(said, written) if grounded is None else stream_checked(keep(said, written), sources):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(say(" (stopped)"), end="")
        except LuthierError as err:
            print(say(f"{err} (/reset starts over, /undo takes back a turn)"))
            continue
        print()
        text = "".join(said)
        if grounded is not None:
            made = grounded.finish(text, sources)
            text = made.text
            print(show_sources(made))
        turns += [Message("user", line), Message("assistant", text)]


def keep(said: list[str], pieces: Iterable[str]) -> Iterator[str]:
    """The pieces, each also added to `said`."""
    for piece in pieces:
        said.append(piece)
        yield piece


def _save(path: Path, turns: Sequence[Message]) -> None:
    if not any(turn.role == "assistant" for turn in turns):
        print(say("nothing was said yet, so there is nothing to save"))
        return
    row = {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as err:
        print(say(f"{path}: cannot be written ({err.strerror}); give /save another file"))
    else:
        print(say(f"added to {path}"))
