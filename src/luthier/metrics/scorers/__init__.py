"""Scores of one answer against its gold, and their corpus values."""

from luthier.core.catalog import Catalog
from luthier.metrics.scorers.part import Scorer as Scorer

SCORERS: "Catalog[Scorer]" = Catalog(
    "scorer",
    {
        "exact_match": ".answers:ExactMatch",
        "token_f1": ".answers:TokenF1",
        "bleu": ".bleu:Bleu",
        "chrf": ".chrf:Chrf",
        "rouge": ".rouge:Rouge",
    },
    __name__,
)
