"""Keys and values of the texts that an encoder-decoder writes, a row each: of the answer so far, and of the source.

A step is one token more of each of several texts, wherever each of them is. It goes through transformers' own decoder over a
cache whose rows begin at their first token: what the family makes of a token's place (a vector, or a bias by distance) it is
asked for by row. Where the family's attention is no more than scores and a softmax, the kernel of `native.pages` takes its place
and reads each row up to its end; else rows are as wide as the longest, and masked. `writes_by_slots` tries which of them gives
what the model's own forward gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, EncoderDecoderCache

from luthier.core.errors import ModelError
from luthier.models.output import head_of
from luthier.models.packed import mask_of, pad
from luthier.models.pages import TOLERANCE
from luthier.models.spec import LoadedModel
from luthier.native.layers import usable
from luthier.native.pages import attend_pages

# Rows grow by so many tokens.
GROWN = 64
NAME = "luthier-rows"
Way: TypeAlias = Literal["direct", "masked"]
Taken: TypeAlias = Callable[[Tensor], Tensor]


class Rows:
    """Keys or values of texts in one layer [R, T, H, D]; what lies beyond a text's end is not looked at."""

    def __init__(self, blank: bool):
        self.held: Tensor = torch.empty(0)
        # Where rows are masked, what is not looked at is multiplied by nothing, and must be a number.
        self._blank = blank

    def reserve(self, rows: int, tokens: int, like: Tensor) -> None:
        """Room for so many texts and tokens, of numbers and heads like these [.., H, D]; what is there is kept."""
        had = self.held.shape if self.held.dim() == 4 else (0, 0, 0, 0)
        if rows <= had[0] and tokens <= had[1]:
            return
        rows, tokens = (had[0] if rows <= had[0] else max(rows, 2 * had[0])), max(tokens, had[1])
        shape = (rows, -(-tokens // GROWN) * GROWN, *like.shape[-2:])
        wider = like.new_zeros(shape) if self._blank else like.new_empty(shape)
        if had[0]:
            wider[: had[0], : had[1]] = self.held
        self.held = wider


class Slots:
    """The rows of all texts, densely: the last one takes the place of one that is dropped. Read `direct` by the kernel, or
    `masked` by the family's own attention."""

    def __init__(self, way: Way = "masked"):
        self.way: Way = way
        self.places: dict[int, int] = {}
        """The row of each text, by its key."""
        self.written: list[int] = []
        """Of each row, how many tokens of its answer lie there, and how many of its source."""
        self.sources: list[int] = []
        self.layers: list[tuple[Rows, Rows, Rows, Rows]] = []
        self.biased: list[Any] | None = None
        """Parts of the decoder that make a bias by distance; None: not looked for yet."""

    def put(self, keys: Sequence[int], cache: EncoderDecoderCache, sources: Sequence[int]) -> None:
        """New texts, as a cache holds them whose rows are padded on the right."""
        for key in keys:
            self.drop(key)
        own, cross = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        blank = self.way == "masked"
        self.layers = self.layers or [(Rows(blank), Rows(blank), Rows(blank), Rows(blank)) for _ in own]
        start, stop = len(self.written), len(self.written) + len(keys)
        for layer, one, other in zip(self.layers, own, cross, strict=True):
            for rows, new_SHTD in zip(layer, (*held_in(one), *held_in(other))):
                new_STHD = new_SHTD.transpose(1, 2)
                rows.reserve(stop, new_STHD.shape[1], new_STHD)
                rows.held[start:stop, : new_STHD.shape[1]] = new_STHD
        self.places.update(zip(keys, range(start, stop)))
        self.written += [held_in(own[0])[0].shape[2]] * len(keys)
        self.sources += sources

    def copy(self, source: int, target: int) -> None:
        """A text once more, under another key."""
        self.drop(target)
        row, stop = self.places[source], len(self.written) + 1
        written, of_source = self.written[row], self.sources[row]
        for layer in self.layers:
            for rows, size in zip(layer, (written, written, of_source, of_source)):
                rows.reserve(stop, size, rows.held)
                rows.held[stop - 1, :size] = rows.held[row, :size]
        self.places[target] = stop - 1
        self.written.append(written)
        self.sources.append(of_source)

    @torch.inference_mode()
    def drop(self, key: int) -> None:
        """Let go of a text, if it is there."""
        row = self.places.pop(key, None)
        if row is None:
            return
        last = len(self.written) - 1
        if row < last:
            written, source = self.written[last], self.sources[last]
            for layer in self.layers:
                for rows, size in zip(layer, (written, written, source, source)):
                    rows.held[row, :size] = rows.held[last, :size]
            self.written[row], self.sources[row] = written, source
            self.places[next(one for one, at in self.places.items() if at == last)] = row
        self.written.pop()
        self.sources.pop()
        if not self.written:
            self.layers = []


def held_in(layer: object) -> tuple[Tensor, Tensor]:
    """The keys and values [S, H, T, D] of a layer of transformers' cache. Raises ValueError where it holds something else."""
    if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
        raise ValueError("a layer of this model keeps no keys and values of what came before")
    return layer.keys, layer.values


class _Growing(DynamicLayer):  # type: ignore[no-untyped-call]
    """Some of the rows of a layer, each with one token more at its own end."""

    def __init__(self, keys: Rows, values: Rows, rows_R: Tensor, ends_R: Tensor, width: int, take: Taken):
        super().__init__()  # type: ignore[no-untyped-call]
        self._pair, self._rows_R, self._ends_R, self._width, self._take = (keys, values), rows_R, ends_R, width, take

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for rows, new in zip(self._pair, (key_states, value_states)):
            rows.held[self._rows_R, self._ends_R] = new[:, :, 0]
        return self._take(self._pair[0].held), self._take(self._pair[1].held)

    def get_seq_length(self) -> int:
        return self._width - 1


def attend_rows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, scaling: float | None = None,
    position_bias: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it, of one token of each text: query [R, H, 1, D] to [R, 1, H, D]. Key and value are
    whole rows [*, T, H, D]; where a mask would stand is [2, 1, 1, R]: in which block of GROWN tokens each text begins, and
    how many of its tokens it sees. Raises ValueError where there is more to a score."""
    if position_bias is not None:
        raise ValueError("scores with a bias are not for the kernel")
    size = query.shape[-1]
    out_RHD = attend_pages(
        query[:, :, 0], key.view(-1, *key.shape[2:]), value.view(-1, *value.shape[2:]),
        _blocks(key.shape[0] * key.shape[1] // GROWN), attention_mask[0, 0, 0], attention_mask[1, 0, 0], GROWN,
        scale=size**-0.5 if scaling is None else scaling,
    )  # fmt: skip
    return out_RHD[:, None], None


@lru_cache(maxsize=8)
def _blocks(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


AttentionInterface.register(NAME, attend_rows)


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
    decoder, device = model.network.get_decoder(), model.device
    rows = [slots.places[key] for key in keys]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    chosen = [rows[at] for at in order]
    ends, sizes = [slots.written[row] for row in chosen], [slots.sources[row] for row in chosen]
    rows_R, ends_R, sizes_R, ids_R = torch.tensor([chosen, ends, sizes, [ids[at] for at in order]], device=device)
    width, wide = max(ends) + 1, max(sizes)
    for layer in slots.layers:
        for one in layer[:2]:
            one.reserve(len(slots.written), width, one.held)
    first, direct = slots.layers[0], slots.way == "direct"
    dtype, every = first[0].held.dtype, chosen == list(range(len(chosen)))

    def taken(width: int) -> Taken:
        if direct:
            return lambda held: held
        # Without a copy where all rows are chosen, in order.
        return lambda held: (held[: len(chosen), :width] if every else held[rows_R, :width]).transpose(1, 2)

    def seen(seen_R: Tensor, width: int, held: Tensor) -> Tensor:
        if direct:
            return torch.stack([rows_R * (held.shape[1] // GROWN), seen_R])[:, None, None]
        return _seen(seen_R, width, dtype)

    own, cross, take = [], [], taken(wide)
    for keys_own, values_own, keys_cross, values_cross in slots.layers:
        own.append(_Growing(keys_own, values_own, rows_R, ends_R, width, taken(width)))
        read = DynamicLayer()  # type: ignore[no-untyped-call]
        read.is_initialized = True
        read.keys, read.values = take(keys_cross.held), take(values_cross.held)
        cross.append(read)
    cache = EncoderDecoderCache(Cache(layers=[*own]), Cache(layers=[*cross]))
    with _by_row(slots, decoder, ends_R), _attending(decoder, NAME if direct else None):
        states_R1E: Tensor = decoder(
            input_ids=ids_R[:, None],
            attention_mask=seen(ends_R + 1, width, first[0].held),
            # Their keys and values are there: it is only asked whether there are any.
            encoder_hidden_states=torch.empty(len(order), wide, 1, dtype=dtype, device=device),
            encoder_attention_mask=seen(sizes_R, wide, first[2].held),
            use_cache=True,
            **{_cache_name(decoder): cache},
        )[0]
    for row in chosen:
        slots.written[row] += 1
    if order == list(range(len(order))):
        return states_R1E[:, 0]
    found_SE = torch.empty_like(states_R1E[:, 0])
    found_SE[order] = states_R1E[:, 0]
    return found_SE


@contextmanager
def _attending(decoder: Any, name: str | None) -> Iterator[None]:
    """Inside, the decoder attends by the function of that name, if there is any."""
    config = decoder.config
    own = config._attn_implementation
    config._attn_implementation = name or own
    try:
        yield
    finally:
        config._attn_implementation = own


def _seen(sizes_R: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[R, 1, 1, T]: 0 on the first tokens of each row, and the lowest number on what is beyond."""
    beyond_RT = torch.arange(width, device=sizes_R.device) >= sizes_R[:, None]
    lowest = torch.finfo(dtype).min
    return torch.zeros(beyond_RT.shape, dtype=dtype, device=sizes_R.device).masked_fill_(beyond_RT, lowest)[
        :, None, None
    ]


@contextmanager
def _by_row(slots: Slots, decoder: Any, places_R: Tensor) -> Iterator[None]:
    """Inside, the decoder takes the token in row r to be at place r: for vectors of places, and for biases by distance."""
    if slots.biased is None:
        parts = decoder.modules()
        slots.biased = [
            one for one in parts if hasattr(one, "relative_attention_bias") and hasattr(one, "compute_bias")
        ]
    with ExitStack() as held:
        embed = getattr(decoder, "embed_positions", None)
        if embed is not None:
            held.enter_context(_instead(embed, "forward", _places(embed, places_R)))
        for one in slots.biased or ():
            held.enter_context(_instead(one, "compute_bias", _bias(one.compute_bias, places_R)))
        yield


def _places(embed: nn.Module, places_R: Tensor) -> Callable[..., Tensor]:
    whole = embed.forward
    named = "position_ids" in _named(type(embed).forward)
    some = 0 if getattr(embed, "padding_idx", None) != 0 else 1

    def forward(first: Any, *_: Any, **__: Any) -> Tensor:
        vectors: Tensor
        if named:
            vectors = whole(first, position_ids=places_R)
        else:
            # Places are counted from ids that are no padding: all are made, and those of the rows taken.
            count = int(places_R.max()) + 1
            vectors = whole(torch.full((1, count), some, device=places_R.device))[0][places_R]
        return vectors.reshape(len(places_R), 1, -1)

    return forward


def _bias(whole: Callable[..., Tensor], places_R: Tensor) -> Callable[..., Tensor]:
    def compute_bias(queries: int, keys: int, device: Any = None, past_seen_tokens: Any = 0) -> Tensor:
        bias_1HRK = whole(queries, keys, device=device, past_seen_tokens=places_R[:, None])
        return bias_1HRK[0].transpose(0, 1)[:, :, None]

    return compute_bias


@contextmanager
def _instead(owner: nn.Module, name: str, other: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, `owner` has another method of that name."""
    setattr(owner, name, other)
    try:
        yield
    finally:
        delattr(owner, name)


def _cache_name(decoder: nn.Module) -> str:
    """What its forward calls the keys and values: transformers renamed them."""
    return "cache" if "cache" in _named(type(decoder).forward) else "past_key_values"


@lru_cache(maxsize=64)
def _named(forward: Callable[..., Any]) -> frozenset[str]:
    """What the forward of a kind of module can be given by name: asked once, as it takes as long as a layer."""
    return frozenset(inspect.signature(forward).parameters)


@torch.no_grad()
def slot_bytes(model: LoadedModel) -> int:
    """Bytes that the keys and values of a token of a source take, and as many those of an answer's: read off a text of one."""
    training = model.module.training
    model.module.eval()
    try:
        start = model.config.decoder_start_token_id
        _, cache = begin(model, [[0]], (int(start or 0),))
    finally:
        model.module.train(training)
    return sum(part.nbytes for one in cache.cross_attention_cache.layers for part in held_in(one))


def writes_by_slots(model: LoadedModel, opening: Sequence[int]) -> bool:
    """Whether texts of several lengths, gone on with side by side, get the logits of the model's own forward: tried once."""
    return way_of(model, opening) is not None


def way_of(model: LoadedModel, opening: Sequence[int]) -> Way | None:
    """How they do: `direct` where it can be, or `masked`; None where neither gives those logits."""
    if model.slots is None:
        ways: tuple[Way, ...] = ("direct", "masked") if usable(next(model.module.parameters())) else ("masked",)
        written = model.spec.kind == "encoder-decoder"
        model.slots = next((way for way in ways if written and _try(model, opening, way)), "")
    return model.slots or None


@torch.no_grad()
def _try(model: LoadedModel, opening: Sequence[int], way: Way) -> bool:
    module: Any = model.module
    vocabulary = model.network.get_input_embeddings().weight.shape[0]
    tokens = [(at * 7 + 3) % min(vocabulary, 1000) for at in range(40)]
    sources, answers = [tokens[:9], tokens[9:14], tokens[14:25]], [tokens[25:27], tokens[27:31], tokens[31:32]]
    training = module.training
    module.eval()
    try:
        slots, found, right = Slots(way), [], []
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
