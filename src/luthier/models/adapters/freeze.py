"""The last layers and the head learn, the rest stays."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from luthier.core.errors import ConfigError
from luthier.models.adapters.part import Adapter

if TYPE_CHECKING:
    from torch.nn import Module, ModuleList

    from luthier.models.spec import LoadedModel

FINAL_NORM = re.compile(r"norm|ln_f|final_.*norm|layer_norm")


class Freeze(Adapter):
    """Train the last layers, the norm after them, and the head.

    Of an encoder-decoder that generates, the decoder's last layers; a head that shares its weights with the
    embedding stays as it is, since training it would train the first layer too. An adapter that the model brings is
    merged first.
    """

    kind: ClassVar[str] = "freeze"

    layers: int = Field(2, ge=0)
    """How many layers learn, counted from the end; 0: the head alone."""

    def apply(self, loaded: LoadedModel) -> None:
        from luthier.models.adapters.merge import merge_adapter

        merge_adapter(loaded)
        owner, stack = find_layers(loaded)
        if self.layers > len(stack):
            raise ConfigError(f"adapter.layers: {self.layers} layers cannot learn, the model has {len(stack)}")
        learning: set[int] = set()
        for layer in list(stack)[len(stack) - self.layers :]:
            learning.update(id(parameter) for parameter in layer.parameters())
        if self.layers:
            for name, child in owner.named_children():
                if FINAL_NORM.fullmatch(name):
                    learning.update(id(parameter) for parameter in child.parameters())
        body = {id(parameter) for parameter in loaded.network.base_model.parameters()}
        learning.update(id(parameter) for parameter in loaded.module.parameters() if id(parameter) not in body)
        if not learning:
            raise ConfigError(
                "adapter.layers: with 0 layers nothing is left to learn, the head shares the embedding's weights"
            )
        for parameter in loaded.module.parameters():
            parameter.requires_grad_(id(parameter) in learning)


def find_layers(loaded: LoadedModel) -> tuple[Module, ModuleList]:
    """The stack of layers that ends in the head, and the module that holds it."""
    from torch.nn import ModuleList

    body: Any = loaded.network.base_model
    if loaded.spec.kind == "encoder-decoder":
        body = body.get_decoder() if loaded.spec.task == "seq2seq" else body.get_encoder()
    stacks = [(owner, child) for owner in body.modules() for child in owner.children() if isinstance(child, ModuleList)]
    if not stacks:
        raise ConfigError(
            f"adapter 'freeze' finds no stack of layers in a {loaded.spec.family} model; use 'full' or 'lora'"
        )
    # Stacks inside a layer are shorter in parameters than the stack of layers itself.
    return max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack[1].parameters()))
