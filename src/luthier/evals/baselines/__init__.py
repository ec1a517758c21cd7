"""What anybody could do without a language model: the least that a tuned one has to beat."""

from collections.abc import Sequence

from luthier.core.catalog import Catalog
from luthier.core.types import Task
from luthier.evals.baselines.part import Baseline as Baseline

BASELINES: "Catalog[Baseline]" = Catalog(
    "baseline",
    {"majority": ".majority:Majority", "mean": ".mean:Mean", "tfidf": ".tfidf:Tfidf", "copy": ".copy:Copy"},
    __name__,
)
FITTING: dict[Task, tuple[str, ...]] = {
    "classify": ("majority", "tfidf"),
    "regress": ("mean", "tfidf"),
    "seq2seq": ("copy",),
}


def baselines_for(task: Task) -> Sequence[Baseline]:
    """The baselines that make sense for a task; none for free text of a language model."""
    return [BASELINES.parse(name) for name in FITTING.get(task, ())]
