"""How gradients move weights."""

from luthier.core.catalog import Catalog
from luthier.training.optimizers.part import Optimizer as Optimizer

OPTIMIZERS: "Catalog[Optimizer]" = Catalog(
    "optimizer",
    {
        "sgd": ".sgd:SGD",
        "adam": ".adam:Adam",
        "adamw": ".adam:AdamW",
        "adafactor": ".adafactor:Adafactor",
        "muon": ".muon:Muon",
        "lion": ".lion:Lion",
        "schedule_free": ".schedule_free:ScheduleFree",
        "adamw8bit": ".adamw8bit:AdamW8bit",
        "apollo": ".apollo:Apollo",
        "galore": ".galore:GaLore",
    },
    __name__,
)
