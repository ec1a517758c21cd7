"""What puts a step's tokens through a model: its own module, or the native decoder where its weights are packed; and what
plans for it."""

from __future__ import annotations

from luthier.engine.blocks import Blocks
from luthier.engine.crossed import Crossed, why_padded
from luthier.engine.paged import Paged
from luthier.engine.reader import Reader
from luthier.engine.schedule import Schedule
from luthier.engine.seats import Seats
from luthier.models.mapped import by_layers
from luthier.models.pages import writes_by_pages
from luthier.models.slots import slot_bytes
from luthier.models.spec import LoadedModel
from luthier.native.cached import Cached


def reader_for(model: LoadedModel, blocks: int) -> Reader:
    """A reader with so many blocks of keys and values."""
    if model.spec.kind == "encoder-decoder":
        return Crossed(model)
    return Paged(model, blocks) if model.native is None else Cached(model.native, blocks)


def kept_bytes(model: LoadedModel) -> int:
    """Bytes that the keys and values of a token take, in the form that its reader keeps them in."""
    if model.spec.kind == "encoder-decoder":
        return slot_bytes(model)
    return int(model.pages or 0) if model.native is None else model.native.kept_bytes


def weight_bytes(model: LoadedModel) -> int:
    """Bytes of the weights that it is read with: its own, or those that are packed and the table of embeddings."""
    if model.native is None:
        return sum(one.nbytes for one in model.network.parameters())
    return int(model.native.nbytes + model.native.decoder.embedding_VE.nbytes)


def schedule_for(reader: Reader, blocks: Blocks, streams: int, tokens: int) -> Schedule | Seats:
    """What plans the steps of a reader."""
    if isinstance(reader, Crossed):
        return Seats(blocks, streams, tokens, reader.drop)
    return Schedule(blocks, streams, tokens)


def writes_side_by_side(model: LoadedModel) -> bool:
    """Whether a language model's texts can come and go between steps: tried once."""
    if model.spec.task == "seq2seq":
        return why_padded(model) is None
    if model.pages is None and model.as_stored:
        # It reads all weights, and so will packing, a part at a time.
        with by_layers(model.network):
            return writes_by_pages(model)
    return writes_by_pages(model)
