"""Every weight learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from luthier.models.adapters.part import Adapter

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel


class Full(Adapter):
    """Train all weights that the task uses. An adapter that the model brings is merged first."""

    kind: ClassVar[str] = "full"

    def apply(self, loaded: LoadedModel) -> None:
        from luthier.models.adapters.inject import used_parameters
        from luthier.models.adapters.merge import merge_adapter

        merge_adapter(loaded)
        used = {id(parameter) for parameter in used_parameters(loaded)}
        for parameter in loaded.module.parameters():
            parameter.requires_grad_(id(parameter) in used)
