"""What a model's process may hold in memory, as it is planned at the start."""

from __future__ import annotations

from luthier.engine import lanes, passes, pooler
from luthier.engine.engine import TOKENS
from luthier.engine.readers import kept_bytes, weight_bytes
from luthier.faces.server.labelled import AT_ONCE
from luthier.models.pages import BLOCK
from luthier.models.spec import LoadedModel


def room_for(model: LoadedModel, streams: int) -> int:
    """Tokens of all texts together whose keys and values are kept for those that are written."""
    return (model.spec.max_length + 64) * streams


def plan_memory(model: LoadedModel, streams: int, waiting: int, *, writes: bool) -> dict[str, int]:
    """Bytes of the weights, of the keys and values of texts that are written, and of those beside them: of what labels and pairs
    are scored after, by the model and by one adapter at a time, and of texts that vectors are made of."""
    room = room_for(model, streams) if writes else 0
    beside = _beside(model, waiting) if writes and model.spec.task == "causal" else 0
    return {
        "weight_bytes": weight_bytes(model),
        "kept_tokens": room,
        "kept_bytes": kept_bytes(model) * room if writes else 0,
        "beside_tokens": beside,
        "beside_bytes": kept_bytes(model) * beside,
    }


def _beside(model: LoadedModel, waiting: int) -> int:
    context = model.spec.max_length
    if model.native is None:
        # The beginning that prompts have in common; vectors keep nothing.
        return 2 * context
    scored = lanes.blocks_held(context, AT_ONCE, passes.TOKENS)
    return BLOCK * (2 * scored + pooler.blocks_held(context, waiting, TOKENS))
