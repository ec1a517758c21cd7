"""The sources of an answer, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.faces.cli.chinese import say
from luthier.retrieval.answer import Answer, SourceRow, as_row
from luthier.retrieval.prompt import Source


def show_sources(made: Answer) -> str:
    """The sources that an answer cites; where it cites none, those that it was given."""
    return show_rows(as_row(made)["sources"])


def show_rows(rows: Sequence[SourceRow]) -> str:
    """The same of an answer as a row."""
    cited = [row for row in rows if row["cited"]]
    head = say("sources:" if cited else "no passage is cited; these were read:")
    return "\n".join([head, *(f"  [{row['number']}] {row['place']}" for row in cited or rows)])


def show_passages(sources: Sequence[Source]) -> str:
    """Passages in full, each under the place where it stands."""
    return "\n\n".join(f"[{one.number}] {one.passage.citation}\n{one.passage.shown}" for one in sources)
