"""What a tuning rendered when it encoded its rows, held against what its saved model renders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from luthier.core.errors import DataError, RunError
from luthier.core.events import Events
from luthier.core.run import Run
from luthier.text.golden import Golden, find_difference, make_golden, read_golden, stand_still, write_golden

if TYPE_CHECKING:
    from luthier.core.types import Encoded
    from luthier.models.spec import LoadedModel
    from luthier.verbs.work import Work


@dataclass(frozen=True)
class Rendered:
    """The fixed texts as they were rendered, and the first training example, which is never written anywhere."""

    golden: Golden
    rows: list[Encoded] | str
    """Its rows, or why it gives none by itself."""


def note_rendering(work: Work, model: LoadedModel | None = None) -> Rendered:
    """How `model` (by default the tuned one) renders, cut and weighed as the tuning asks."""
    model = model or work.model
    still = stand_still(model.renderer)
    still.truncate, still.learn, still.max_length = work.config.truncate, work.config.learn, work.model.spec.max_length
    alone = replace(model, renderer=still)
    rows: list[Encoded] | str
    try:
        rows = work.objective.encode(work.dataset.train[:1], alone, Events())
    except DataError as err:
        rows = str(err)
    return Rendered(make_golden(model.renderer), rows)


def find_rendered_otherwise(now: Rendered, then: Rendered) -> str | None:
    """What is rendered otherwise than it was; None where nothing is."""
    different = find_difference(now.golden, then.golden)
    if different is None and now.rows != then.rows:
        return "the first training row is encoded otherwise than before training"
    return different


def keep_rendering(work: Work, run: Run) -> None:
    """Keep how fixed texts are rendered in the run. Raises RunError when it goes on after rendering them otherwise."""
    begun = read_golden(run.artefacts)
    different = find_difference(work.rendered.golden, begun) if begun is not None else None
    if different is not None:
        raise RunError(
            f"run:{run.id}: the model {work.config.model} reads text otherwise than when this run began, so it cannot go on: "
            f"{different}; bring back its tokenizer and template, or start a new run"
        )
    write_golden(work.model.renderer, run.artefacts)
