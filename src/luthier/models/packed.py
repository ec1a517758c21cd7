"""A flat batch through a model: packed where the family allows it, side by side with padding where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from luthier.core.events import Events
from luthier.models.attention import packed_attention
from luthier.models.segments import Segments
from luthier.models.spec import LoadedModel
from luthier.models.virtual import insert, reads_packed

# Families that number positions from just after the pad id.
SHIFTED = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm")
# What packed and separate may differ by, relative to the size of the states: rounding in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}


def hidden_states(model: LoadedModel, ids_N: Tensor, lengths: Sequence[int], parents: Sequence[int] = ()) -> Tensor:
    """The last hidden states [N, E] of segments laid end to end, each read as if it were alone.

    A segment with a parent (see Batch.parents) is read as what follows the parent's tokens; a causal model reads the
    parent once for all of them. Of an encoder-decoder, those of its encoder.
    """
    if any(up >= 0 for up in parents):
        if shares(model):
            return _packed(model, ids_N, lengths, parents)
        return _repeated(model, ids_N, lengths, parents)
    if packs(model):
        return _packed(model, ids_N, lengths)
    return _padded(model, ids_N, lengths)


def _repeated(model: LoadedModel, ids_N: Tensor, lengths: Sequence[int], parents: Sequence[int]) -> Tensor:
    """Children read by reading their parent again before each: the reference for reading it once."""
    pieces = torch.split(ids_N, list(lengths))
    whole = [piece if up < 0 else torch.cat([pieces[up], piece]) for piece, up in zip(pieces, parents)]
    states_NE = hidden_states(model, torch.cat(whole), [len(one) for one in whole])
    states = torch.split(states_NE, [len(one) for one in whole])
    return torch.cat([one[-length:] for one, length in zip(states, lengths)])


def packs(model: LoadedModel, events: Events | None = None) -> bool:
    """Whether packed equals separate for this model: tried once, on two short texts, and remembered.

    Where it does not (an attention of the family's own, positions that cannot be given), a notice goes to `events`, and
    segments are padded instead.
    """
    if model.packs is None:
        model.packs = _try(model)
    if events is not None and not model.packs and model.spec.kind != "encoder-decoder":
        events.choose(
            "packing", "off", f"{model.spec.family} models do not read texts laid end to end; rows are padded"
        )
    return model.packs


def shares(model: LoadedModel, events: Events | None = None) -> bool:
    """Whether a text read once for all that continue it equals reading it before each: tried once, and remembered.

    Only a causal model that packs can. Where it does not, a notice goes to `events`, and it is read again before each.
    """
    if model.shares is None:
        model.shares = model.spec.kind == "decoder" and packs(model) and _try(model, (-1, 0, -1, 0))
    if events is not None and not model.shares and model.spec.kind == "decoder":
        events.choose(
            "shared prompts",
            "read again",
            f"{model.spec.family} models do not read a text once for all that continue it",
        )
    return model.shares


@torch.no_grad()
def _try(model: LoadedModel, parents: Sequence[int] = ()) -> bool:
    """Whether two short texts laid end to end (with `parents`: two, and what continues the first) are read as they are alone."""
    if model.spec.kind == "encoder-decoder" or not reads_packed(model.network):
        return False
    vocabulary = model.network.get_input_embeddings().weight.shape[0]
    lengths = (5, 11, 3, 4) if parents else (5, 11)
    ids_N = (torch.arange(sum(lengths), device=model.device) * 7 + 3) % min(vocabulary, 1000)
    training = model.module.training
    model.module.eval()
    try:
        packed = _packed(model, ids_N, lengths, parents).float()
        alone = (_repeated(model, ids_N, lengths, parents) if parents else _padded(model, ids_N, lengths)).float()
    except (TypeError, ValueError, KeyError, AttributeError):
        # The family's attention takes no segments, or its forward no positions.
        return False
    finally:
        model.module.train(training)
    return float((packed - alone).abs().max()) <= TOLERANCE[model.network.dtype] * float(alone.abs().max())


def _packed(model: LoadedModel, ids_N: Tensor, lengths: Sequence[int], parents: Sequence[int] = ()) -> Tensor:
    network = model.network
    ids_N, lengths, text_N = insert(network, ids_N, lengths, parents)
    starts = [lengths[up] if up >= 0 else 0 for up in parents or (-1,) * len(lengths)]
    places = [torch.arange(start, start + length) for start, length in zip(starts, lengths)]
    places_N = torch.cat(places).to(ids_N.device)
    if network.config.model_type in SHIFTED:
        places_N += network.config.pad_token_id + 1
    inputs: dict[str, Any] = {"input_ids": ids_N[None], "position_ids": places_N[None]}
    inputs["segments"] = Segments(lengths, ids_N.device, parents)
    separator = getattr(model.module, "separator", None)
    if separator is not None:
        parts = torch.split(ids_N, list(lengths))
        inputs["token_type_ids"] = torch.cat([text_of_pair(part, separator) for part in parts])[None]
    if hasattr(network.config, "use_cache"):
        inputs["use_cache"] = False
    with packed_attention(network):
        states_NE: Tensor = network.base_model(**inputs).last_hidden_state[0]
    return states_NE if text_N is None else states_NE[text_N]


def _padded(model: LoadedModel, ids_N: Tensor, lengths: Sequence[int]) -> Tensor:
    network: Any = model.network
    body = network.get_encoder() if model.spec.kind == "encoder-decoder" else network.base_model
    fill = model.tokenizer.pad_token_id or 0
    ids_ST = pad(ids_N, lengths, fill)
    mask_ST = mask_of(lengths, ids_N.device)
    inputs: dict[str, Any] = {"input_ids": ids_ST}
    if model.spec.kind != "decoder":
        # A causal model never looks to the right, where the padding is.
        inputs["attention_mask"] = mask_ST
    elif hasattr(network.config, "use_cache"):
        inputs["use_cache"] = False
    separator = getattr(model.module, "separator", None)
    if separator is not None:
        inputs["token_type_ids"] = torch.stack([text_of_pair(row, separator) for row in ids_ST]) * mask_ST
    # An encoder keeps the states of virtual tokens, in front, for its decoder.
    return inside(body(**inputs).last_hidden_state[:, -ids_ST.shape[1] :], lengths)


def pad(flat_N: Tensor, lengths: Sequence[int], fill: int | float) -> Tensor:
    """[S, T]: segments side by side, `fill` to their right."""
    return pad_sequence(list(torch.split(flat_N, list(lengths))), batch_first=True, padding_value=fill)


def mask_of(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """[S, T]: 1 on the tokens of each segment, 0 on what pads it."""
    sizes_S1 = torch.tensor(lengths, device=device)[:, None]
    return (torch.arange(max(lengths), device=device) < sizes_S1).long()


def inside(padded_STE: Tensor, lengths: Sequence[int]) -> Tensor:
    """[N, E]: what `pad` laid side by side end to end again. The places are found on the host."""
    width = padded_STE.shape[1]
    places = [torch.arange(at * width, at * width + length) for at, length in enumerate(lengths)]
    return padded_STE.flatten(0, 1)[torch.cat(places).to(padded_STE.device)]


def text_of_pair(ids_T: Tensor, separator: int) -> Tensor:
    """[T]: 0 up to the first separator, 1 after it."""
    ends = (ids_T == separator).long()
    return (ends.cumsum(0) - ends).clamp(max=1)
