"""The rows of a tuning, turned into tokens once: by one process of each machine, and not again for the same data."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import tokenizers
import transformers

import luthier
from luthier.core.events import Event, Events
from luthier.core.types import Encoded, Example
from luthier.data.cache import NotStorable, entry_path, read_entry, write_entry
from luthier.models.quiet import quiet
from luthier.models.spec import LoadedModel
from luthier.training.objectives.part import Objective
from luthier.training.world import World

# Less text than this is turned into tokens sooner than looked up.
WORTH = 2_000_000
# What of a spec says where a model lies and what became of it, and nothing of how it reads.
PLACES = {"source", "base", "base_fingerprint", "adapter", "learned", "precision"}


def encode_once(
    part: str, examples: Sequence[Example], objective: Objective, model: LoadedModel, world: World, events: Events
) -> Sequence[Encoded]:
    """`objective.encode(examples)`, from the cache where it holds them, else encoded by the first process of each machine
    and read from its file by the others. Must be done before the processes form their group. `part` names the examples.

    What was said while encoding is said again. Few examples of a process alone are encoded without a look at the cache.
    """
    if world.size == 1 and not _worth(examples):
        return objective.encode(examples, model, events)
    key = key_of(examples, objective, model)
    told = f"encoded/{world.node}/{part}"
    if world.local_rank > 0:
        found = read_entry(Path(path), check=False) if (path := world.hear(told)) else None
        return objective.encode(examples, model, events) if found is None else found[0]
    found = read_entry(entry_path(key))
    if found is None:
        notes: list[Event] = []
        rows: Sequence[Encoded] = objective.encode(examples, model, _repeating(events, notes))
        try:
            path = str(write_entry(key, rows, notes))
        except (OSError, NotStorable) as why:
            path = ""
            events.choose("cache", "off", f"the encoded rows could not be kept: {why}")
        world.tell(told, path)
        return rows
    world.tell(told, str(entry_path(key)))
    rows, notes = found
    for note in notes:
        _repeat(note, events)
    events.choose("encoding", f"{len(rows)} rows from the cache", "the same examples were encoded before")
    return rows


def key_of(examples: Sequence[Example], objective: Objective, model: LoadedModel) -> str:
    """A name for what encoding gives: SHA-256 over the examples, the objective, the tokenizer, the spec, and the code."""
    digest = hashlib.sha256()
    renderer = model.renderer
    facts: list[Any] = [
        _code(type(objective)),
        (transformers.__version__, tokenizers.__version__, numpy.__version__),
        type(objective).__qualname__,
        objective.model_dump(mode="json"),
        objective.beside(),
        model.spec.model_dump(mode="json", exclude=PLACES),
        (renderer.max_length, renderer.truncate, renderer.learn, repr(renderer.template)),
        tokenizer_fingerprint(model.tokenizer),
    ]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for example in examples:
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:40]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the files of a tokenizer."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder, quiet():
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _worth(examples: Sequence[Example]) -> bool:
    size = 0
    for example in examples:
        size += len(repr(example))
        if size >= WORTH:
            return True
    return False


@cache
def _code(objective: type[Objective]) -> str:
    """Digest of our source and the objective's own: rows that other code made are not taken for ours."""
    root = Path(luthier.__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(root.rglob("*.py")), Path(inspect.getfile(objective))):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _repeating(events: Events, notes: list[Event]) -> Events:
    """Events that are passed on to `events`; what is to be said again another time goes into `notes`."""

    def hear(event: Event) -> None:
        if event["event"] in ("warning", "choice"):
            notes.append({name: value for name, value in event.items() if name != "time"})
        _repeat(event, events)

    return Events(sinks=[hear])


def _repeat(event: Event, events: Events) -> None:
    kind, content = event["event"], {name: value for name, value in event.items() if name not in ("event", "time")}
    known: dict[str, Callable[..., None]] = {"warning": events.warn, "choice": events.choose}
    known[kind](**content) if kind in known else events.emit(kind, **content)
