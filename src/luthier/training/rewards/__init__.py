"""What an answer is worth, where nothing in the text beside it says so; every scorer is a reward too."""

from luthier.core.catalog import Catalog
from luthier.training.rewards.part import Reward as Reward

REWARDS: "Catalog[Reward]" = Catalog(
    "reward",
    {
        "scorer": ".part:Scored",
        "pattern": ".pattern:Pattern",
        "length": ".length:Length",
        "python": ".python:Python",
        "model": ".model:Model",
    },
    __name__,
)
