"""How wrong a prediction is: one loss a row, before weights and sums."""

from luthier.core.catalog import Catalog
from luthier.training.losses.part import Loss as Loss

LOSSES: "Catalog[Loss]" = Catalog(
    "loss",
    {
        "cross_entropy": ".cross_entropy:CrossEntropy",
        "focal": ".focal:Focal",
        "mse": ".errors:MeanSquared",
        "mae": ".errors:MeanAbsolute",
        "huber": ".errors:Huber",
    },
    __name__,
)
