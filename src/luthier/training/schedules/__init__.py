"""How the learning rate moves over the steps."""

from luthier.core.catalog import Catalog
from luthier.training.schedules.part import Schedule as Schedule

SCHEDULES: "Catalog[Schedule]" = Catalog(
    "schedule",
    {
        "constant": ".shapes:Constant",
        "linear": ".shapes:Linear",
        "polynomial": ".shapes:Polynomial",
        "cosine": ".shapes:Cosine",
        "inverse_sqrt": ".shapes:InverseSqrt",
        "wsd": ".shapes:WarmupStableDecay",
    },
    __name__,
)
