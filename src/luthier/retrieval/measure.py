"""What an index can tell, measured when it is made: on halves of its own sentences, and on questions where some are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.data.sources import read_rows
from luthier.retrieval.bm25 import Words
from luthier.retrieval.embed import Encoder
from luthier.retrieval.passage import Passage
from luthier.retrieval.refuse import Evidence, Measured, Script, fit_quantile, fit_rows, script_of
from luthier.retrieval.scores import Scored, score_all
from luthier.retrieval.sentences import split_pieces, split_sentences
from luthier.retrieval.store import Vectors

# Sentences that are asked of each kind of writing, and how many there must be for a share to mean anything.
ASKED, LEAST = 256, 8
# A half sentence has at most so many words, or Chinese characters.
LONGEST = 20
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


@dataclass(frozen=True, slots=True)
class Half:
    """The first half of a sentence, and the place of the passage that it is from."""

    text: str
    place: int


def measure(
    passages: Sequence[Passage],
    words: Words,
    vectors_NE: Vectors | None,
    encoder: Encoder | None,
    *,
    share: float,
    questions: Path | None,
    events: Events,
) -> dict[Script, Measured]:
    """For each kind of writing whether meaning helps, and when a question is refused.

    A half sentence is asked twice: its own file should be nearest by meaning (of documents), and what the other files have for
    it is what an index has for a question that it does not answer; `share` of those are refused. `questions` with `answerable`
    take the place of the latter. A half sentence shares its words with its own file, as questions do not: how well own files
    are found says nothing of the threshold, which is why it is set by the other files alone.
    """
    groups_N = group(passages)
    found: dict[Script, Measured] = {}
    for script, halves in draw_halves(passages).items():
        if len(halves) < LEAST:
            continue
        nearest: list[bool] = []
        unknown: list[Evidence] = []
        for half, scored in zip(halves, score_all(words, vectors_NE, encoder, [one.text for one in halves])):
            own_N = groups_N == groups_N[half.place]
            if own_N.all():
                continue
            unknown.append(scored.evidence(~own_N))
            if scored.cosine_N is not None and passages[half.place].question is None:
                nearest.append(bool(scored.cosine_N[own_N].max() > scored.cosine_N[~own_N].max()))
        made = Measured(
            sentences=len(halves),
            unknown=None if encoder is None else encoder.unknown([one.text for one in halves]),
            nearest=float(np.mean(nearest)) if len(nearest) >= LEAST else None,
        )
        if len(unknown) >= LEAST:
            said = f"{len(unknown)} halves of sentences against the other files"
            update = {"refusal": fit_quantile(unknown, share, said, encoder is not None and made.compares_meaning)}
            made = made.model_copy(update=update)
        found[script] = made
        if not made.compares_meaning:
            events.warn(
                f"the encoder cannot read texts {'without' if script == 'dense' else 'with'} spaces between words: "
                f"{made.unknown:.0%} of their tokens are not in its vocabulary"
                f"{'' if made.nearest is None else f', and it finds the file of {made.nearest:.0%} of half sentences'}; "
                "words alone are compared there, and an encoder of that language would help"
            )
    if questions is not None:
        _fit_questions(found, words, vectors_NE, encoder, questions)
    if all(one.refusal is None for one in found.values()):
        events.choose(
            "refusal", "none",
            "the documents hold too few sentences to learn from when they do not answer, so every question is answered; "
            "--questions FILE gives questions of both kinds",
        )  # fmt: skip
    return found


def group(passages: Sequence[Passage]) -> NDArray[np.int64]:
    """A number for each passage [N], the same for those that speak of the same: of one file, or of one section where there
    are few files; rows of questions with the same answer."""
    few = len({one.file for one in passages}) < LEAST
    keys = [one.text if one.question is not None else (one.file, one.heading if few else ()) for one in passages]
    numbers = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], np.int64)


def draw_halves(passages: Sequence[Passage]) -> dict[Script, list[Half]]:
    """A sentence of each of some passages, or the question of a row, cut in half; the same ones each time."""
    found: dict[Script, list[Half]] = {"dense": [], "spaced": []}
    random = np.random.default_rng(0)
    for place in random.permutation(len(passages)):
        text = passages[place].question or passages[place].text
        spans = split_sentences(text)
        if not spans:
            continue
        start, end = spans[int(random.integers(len(spans)))]
        pieces = split_pieces(text, start, end)
        # What is shorter is a heading or an item of a list, and says too little.
        if len(pieces) < 6:
            continue
        half = text[pieces[0][0] : pieces[min(len(pieces) // 2, LONGEST) - 1][1]]
        kept = found[script_of(half)]
        if len(kept) < ASKED:
            kept.append(Half(half, int(place)))
        if all(len(one) == ASKED for one in found.values()):
            break
    return found


def _fit_questions(
    found: dict[Script, Measured], words: Words, vectors_NE: Vectors | None, encoder: Encoder | None, path: Path
) -> None:
    rows = _read_questions(path)
    scored = score_all(words, vectors_NE, encoder, [question for question, _ in rows])
    kinds: dict[Script, list[tuple[Scored, bool]]] = {}
    for one, (question, answerable) in zip(scored, rows):
        kinds.setdefault(script_of(question), []).append((one, answerable))
    for script, asked in kinds.items():
        made = found.get(script) or Measured(sentences=0)
        meaning = encoder is not None and made.compares_meaning
        sides = [[one.evidence() for one, answerable in asked if answerable is side] for side in (True, False)]
        update = {"refusal": fit_rows(sides[0], sides[1], f"{len(asked)} questions of {path}", meaning)}
        found[script] = made.model_copy(update=update)


def _read_questions(path: Path) -> list[tuple[str, bool]]:
    """(question, whether it has an answer) of each row. Raises DataError for a row without either."""

    def refuse(where: str, why: str) -> None:
        raise DataError(f"{where}: {why}")

    found = []
    for row in read_rows(path, bad=refuse):
        question, answerable = row.values.get("question"), str(row.values.get("answerable")).lower()
        if not isinstance(question, str) or not question.strip() or answerable not in TRUE + FALSE:
            raise DataError(f"{row.where}: a row needs a question, and answerable: true or false")
        found.append((question, answerable in TRUE))
    return found
