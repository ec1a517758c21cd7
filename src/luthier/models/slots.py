"""Keys and values of the texts that an encoder-decoder writes, a row each: of the answer so far, and of the source.

A step is one token more of each of several texts, wherever each of them is. It goes through transformers' own decoder over a
cache whose rows begin at their first token: what the family makes of a token's place (a vector, or a bias by distance) it is
asked for by row. `writes_by_slots` tries whether that gives what the model's own forward gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from luthier.core.errors import ModelError
from luthier.models.output import head_of
from luthier.models.packed import mask_of, pad
from luthier.models.pages import TOLERANCE
from luthier.models.spec import LoadedModel

# Rows grow by so many tokens.
GROWN = 64


class Rows:
    """Keys or values of texts in one layer [R, H, T, D]; what lies beyond a text's end is not looked at."""

    def __init__(self) -> None:
        self.held: Tensor = torch.empty(0)

    def reserve(self, rows: int, tokens: int, like_SHTD: Tensor) -> None:
        """Room for so many texts and tokens; what is there is kept."""
        had = self.held.shape if self.held.dim() == 4 else (0, 0, 0, 0)
        if rows <= had[0] and tokens <= had[2]:
            return
        _, heads, _, size = like_SHTD.shape
        rows, tokens = (rows if rows <= had[0] else max(rows, 2 * had[0])), max(tokens, had[2])
        # Zeros: what is not looked at is multiplied by nothing, and must be a number.
        wider = like_SHTD.new_zeros(max(rows, had[0]), heads, -(-tokens // GROWN) * GROWN, size)
        if had[0]:
            wider[: had[0], :, : had[2]] = self.held
        self.held = wider


class Slots:
    """The rows of all texts, densely: the last one takes the place of one that is dropped."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}
        """The row of each text, by its key."""
        self.written: list[int] = []
        """Of each row, how many tokens of its answer lie there, and how many of its source."""
        self.sources: list[int] = []
        self.layers: list[tuple[Rows, Rows, Rows, Rows]] = []

    def put(self, keys: Sequence[int], cache: EncoderDecoderCache, sources: Sequence[int]) -> None:
        """New texts, as a cache holds them whose rows are padded on the right."""
        for key in keys:
            self.drop(key)
        own, cross = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        self.layers = self.layers or [(Rows(), Rows(), Rows(), Rows()) for _ in own]
        start, stop = len(self.written), len(self.written) + len(keys)
        for layer, one, other in zip(self.layers, own, cross, strict=True):
            for rows, new in zip(layer, (one.keys, one.values, other.keys, other.values)):
                rows.reserve(stop, new.shape[2], new)
                rows.held[start:stop, :, : new.shape[2]] = new
        self.places.update(zip(keys, range(start, stop)))
        self.written += [own[0].keys.shape[2]] * len(keys)
        self.sources += sources

    @torch.inference_mode()
    def drop(self, key: int) -> None:
        """Let go of a text, if it is there."""
        row = self.places.pop(key, None)
        if row is None:
            return
        last = len(self.written) - 1
        if row < last:
            for rows in (one for layer in self.layers for one in layer):
                rows.held[row] = rows.held[last]
            self.written[row], self.sources[row] = self.written[last], self.sources[last]
            self.places[next(one for one, at in self.places.items() if at == last)] = row
        self.written.pop()
        self.sources.pop()
        if not self.written:
            self.layers = []


class _Growing(DynamicLayer):
    """Some of the rows of a layer, each with one token more at its own end."""

    def __init__(self, keys: Rows, values: Rows, rows_R: Tensor, ends_R: Tensor, width: int, dense: bool):
        super().__init__()
        self._pair, self._rows_R, self._ends_R, self._width, self._dense = (keys, values), rows_R, ends_R, width, dense

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        found = []
        for rows, new in zip(self._pair, (key_states, value_states)):
            rows.held[self._rows_R, :, self._ends_R] = new[:, :, 0]
            found.append(_chosen(rows.held, self._rows_R, self._width, self._dense))
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return self._width - 1


def _chosen(held: Tensor, rows_R: Tensor, width: int, dense: bool) -> Tensor:
    """[R, H, T, D]: without a copy where all rows are chosen, in order."""
    return held[: len(rows_R), :, :width] if dense else held[rows_R, :, :width]


def begin(
    model: LoadedModel, sources: Sequence[Sequence[int]], opening: Sequence[int]
) -> tuple[Tensor, EncoderDecoderCache]:
    """Read sources, and what every answer opens with: the last state [S, E] of each, and the keys and values."""
    module: Any = model.module
    lengths = [len(one) for one in sources]
    flat_N = torch.tensor([token for one in sources for token in one], device=model.device)
    ids_ST, mask_ST = pad(flat_N, lengths, model.tokenizer.pad_token_id or 0), mask_of(lengths, model.device)
    states_STE = module.get_encoder()(input_ids=ids_ST, attention_mask=mask_ST)[0]
    if states_STE.shape[1] != ids_ST.shape[1]:
        raise ModelError(f"{model.spec.source}: its encoder reads more than the text, and cannot be read text by text")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    opening_SO = torch.tensor([list(opening)] * len(sources), device=model.device)
    decoder = module.get_decoder()
    states_SOE = decoder(
        input_ids=opening_SO, encoder_hidden_states=states_STE, encoder_attention_mask=mask_ST, use_cache=True,
        **{_cache_name(decoder): cache},
    )[0]  # fmt: skip
    return states_SOE[:, -1], cache


def go_on(model: LoadedModel, slots: Slots, keys: Sequence[int], ids: Sequence[int]) -> Tensor:
    """[S, E]: the states of one token more of each of these texts."""
    rows = [slots.places[key] for key in keys]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    chosen = [rows[at] for at in order]
    dense = chosen == list(range(len(chosen)))
    decoder, device = model.module.get_decoder(), model.device  # type: ignore[operator]
    rows_R, ends_R = (torch.tensor(one, device=device) for one in (chosen, [slots.written[row] for row in chosen]))
    sizes_R = torch.tensor([slots.sources[row] for row in chosen], device=device)
    width, wide = int(ends_R.max()) + 1, int(sizes_R.max())
    own, cross = [], []
    for keys_own, values_own, keys_cross, values_cross in slots.layers:
        keys_own.reserve(len(slots.written), width, keys_own.held)
        values_own.reserve(len(slots.written), width, values_own.held)
        own.append(_Growing(keys_own, values_own, rows_R, ends_R, width, dense))
        layer = DynamicLayer()
        layer.is_initialized = True
        layer.keys = _chosen(keys_cross.held, rows_R, wide, dense)
        layer.values = _chosen(values_cross.held, rows_R, wide, dense)
        cross.append(layer)
    cache = EncoderDecoderCache(Cache(layers=own), Cache(layers=cross))
    dtype = slots.layers[0][0].held.dtype
    ids_R1 = torch.tensor([[ids[at]] for at in order], device=device)
    with _by_row(decoder, ends_R):
        states_R1E = decoder(
            input_ids=ids_R1,
            attention_mask=_seen(ends_R + 1, width, dtype),
            # Their keys and values are there: it is only asked whether there are any.
            encoder_hidden_states=torch.zeros(len(order), wide, 1, dtype=dtype, device=device),
            encoder_attention_mask=_seen(sizes_R, wide, dtype),
            use_cache=True,
            **{_cache_name(decoder): cache},
        )[0]
    for row in chosen:
        slots.written[row] += 1
    found_SE = torch.empty_like(states_R1E[:, 0])
    found_SE[order] = states_R1E[:, 0]
    return found_SE


def _seen(sizes_R: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[R, 1, 1, T]: 0 on the first tokens of each row, and the lowest number on what is beyond."""
    beyond_RT = torch.arange(width, device=sizes_R.device) >= sizes_R[:, None]
    lowest = torch.finfo(dtype).min
    return torch.zeros(beyond_RT.shape, dtype=dtype, device=sizes_R.device).masked_fill_(beyond_RT, lowest)[
        :, None, None
    ]


@contextmanager
def _by_row(decoder: Any, places_R: Tensor) -> Iterator[None]:
    """Inside, the decoder takes the token in row r to be at place r: for vectors of places, and for biases by distance."""
    with ExitStack() as held:
        embed = getattr(decoder, "embed_positions", None)
        if embed is not None:
            held.enter_context(_instead(embed, "forward", _places(embed, places_R)))
        for one in decoder.modules():
            if hasattr(one, "relative_attention_bias") and hasattr(one, "compute_bias"):
                held.enter_context(_instead(one, "compute_bias", _bias(one.compute_bias, places_R)))
        yield


def _places(embed: Any, places_R: Tensor) -> Any:
    whole = embed.forward
    named = "position_ids" in inspect.signature(whole).parameters
    some = 0 if getattr(embed, "padding_idx", None) != 0 else 1

    def forward(first: Any, *_: Any, **__: Any) -> Tensor:
        if named:
            vectors = whole(first, position_ids=places_R)
        else:
            # Places are counted from ids that are no padding: all are made, and those of the rows taken.
            count = int(places_R.max()) + 1
            vectors = whole(torch.full((1, count), some, device=places_R.device))[0][places_R]
        return vectors.reshape(len(places_R), 1, -1)  # type: ignore[no-any-return]

    return forward


def _bias(whole: Any, places_R: Tensor) -> Any:
    def compute_bias(queries: int, keys: int, device: Any = None, past_seen_tokens: Any = 0) -> Tensor:
        bias_1HRK = whole(queries, keys, device=device, past_seen_tokens=places_R[:, None])
        return bias_1HRK[0].transpose(0, 1)[:, :, None]  # type: ignore[no-any-return]

    return compute_bias


@contextmanager
def _instead(owner: Any, name: str, other: Any) -> Iterator[None]:
    """Inside, `owner` has another method of that name."""
    setattr(owner, name, other)
    try:
        yield
    finally:
        delattr(owner, name)


def _cache_name(decoder: Any) -> str:
    """What its forward calls the keys and values: transformers renamed them."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


def writes_by_slots(model: LoadedModel, opening: Sequence[int]) -> bool:
    """Whether texts of several lengths, gone on with side by side, get the logits of the model's own forward: tried once."""
    if model.slots is None:
        model.slots = model.spec.kind == "encoder-decoder" and _try(model, opening)
    return model.slots


@torch.no_grad()
def _try(model: LoadedModel, opening: Sequence[int]) -> bool:
    module: Any = model.module
    vocabulary = model.network.get_input_embeddings().weight.shape[0]
    tokens = [(at * 7 + 3) % min(vocabulary, 1000) for at in range(40)]
    sources, answers = [tokens[:9], tokens[9:14], tokens[14:25]], [tokens[25:27], tokens[27:31], tokens[31:32]]
    training = module.training
    module.eval()
    try:
        slots, found, right = Slots(), [], []
        for key, source in enumerate(sources):
            _, cache = begin(model, [source], opening)
            slots.put([key], cache, [len(source)])
            # Those that came before go on meanwhile, so that no two are at the same place.
            for one in range(key + 1):
                at = slots.written[slots.places[one]] - len(opening)
                if at < len(answers[one]) - 1:
                    go_on(model, slots, [one], [answers[one][at]])
        keys = [2, 0, 1]
        ats = [slots.written[slots.places[key]] - len(opening) for key in keys]
        states_SE = go_on(model, slots, keys, [answers[key][at] for key, at in zip(keys, ats)])
        for key, at, state_E in zip(keys, ats, states_SE):
            ids = {"input_ids": [sources[key]], "decoder_input_ids": [[*opening, *answers[key][: at + 1]]]}
            given = {name: torch.tensor(one, device=model.device) for name, one in ids.items()}
            right.append(module(**given, use_cache=False).logits[0, -1].float())
            found.append(head_of(model).logits(state_E[None])[0].float())
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ModelError):
        # The family keeps something else of what came before, or counts its places in another way.
        return False
    finally:
        module.train(training)
    apart = max(float((one - other).abs().max()) for one, other in zip(found, right))
    return apart <= TOLERANCE[model.network.dtype] * max(float(one.abs().max()) for one in right)
