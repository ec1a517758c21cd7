"""What puts a step's tokens through a model: its own module, or the native decoder where its weights are packed."""

from __future__ import annotations

from typing import TypeAlias

from luthier.engine.paged import Paged
from luthier.models.spec import LoadedModel
from luthier.native.decoder import Cached

Reader: TypeAlias = Paged | Cached


def reader_for(model: LoadedModel, blocks: int) -> Reader:
    """A reader with so many blocks of keys and values."""
    return Paged(model, blocks) if model.native is None else Cached(model.native, blocks)
