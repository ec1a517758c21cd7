"""The Part that an adapter is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from luthier.core.catalog import Part

if TYPE_CHECKING:
    from torch.nn import Parameter

    from luthier.models.spec import LoadedModel


class Adapter(Part):
    """Chooses the weights that learn, adding some beside the model's own if it wants."""

    quantises: ClassVar[bool] = False
    """Whether the base may be held in fewer bits under it: none of the base's linear weights learn."""
    reads_base: ClassVar[bool] = False
    """Whether it reads the base's weights before they are quantised, and does that itself."""

    def apply(self, loaded: LoadedModel) -> None:
        """Make the model ready to learn, in place; its outputs do not change."""
        raise NotImplementedError(f"{type(self).__name__} must define apply()")

    def trainable(self, loaded: LoadedModel) -> list[tuple[str, Parameter]]:
        """(name, parameter) of all that learns, each once."""
        return [(name, one) for name, one in loaded.module.named_parameters() if one.requires_grad]

    def scales(self, loaded: LoadedModel) -> dict[str, float]:
        """By how much the learning rate of a parameter is multiplied, by its name in `trainable`; missing: 1."""
        return {}

    def merge(self, loaded: LoadedModel) -> None:
        """Fold what was added into the model's own weights, in place; its outputs stay equal up to rounding."""

    def save(self, loaded: LoadedModel, directory: Path) -> None:
        """Write what was added to `directory`; only for adapters that leave the base on its own (`spec.adapter` set)."""
        raise NotImplementedError(f"{type(self).__name__} keeps nothing beside the model: save_model writes it whole")
