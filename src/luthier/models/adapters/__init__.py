"""Which weights learn, and how they are kept."""

from luthier.core.catalog import Catalog
from luthier.models.adapters.part import Adapter as Adapter

ADAPTERS: "Catalog[Adapter]" = Catalog(
    "adapter",
    {
        "full": ".full:Full",
        "freeze": ".freeze:Freeze",
        "lora": ".lora:Lora",
        "dora": ".dora:Dora",
        "pissa": ".pissa:Pissa",
        "peft": ".peft:Peft",
    },
    __name__,
)
