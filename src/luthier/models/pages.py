"""Keys and values of texts that are written, in blocks that any of them can hold: what a step reads and writes of them.

A step is some new tokens of each of several texts, end to end, as in a flat batch; what came before lies in a `Store`.
The attention of `models.attention` takes a `Pages` where it takes the segments of a batch, so every family that reads
texts laid end to end can write with it, unmodified.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.models.attention import Rules, packed_attention
from luthier.models.output import head_of
from luthier.models.packed import packs
from luthier.models.spec import LoadedModel
from luthier.models.varlen import DTYPES, PAGE, Texts, attend_by_text, attend_varlen, by_text, texts_of, why_plainly
from luthier.native.pages import attend_pages

# Tokens of a block, where nothing asks for others (`page_size`).
BLOCK = 32
# On a CPU products of fewer rows in fp32 go another way, and the mean of a single row of a norm does; both round otherwise. A
# step is filled up to so many tokens.
FEWEST = {torch.float32: 8, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}


def page_size(model: LoadedModel) -> int:
    """Tokens of a block of this model's keys and values: on a CUDA device so many as its attention reads at once."""
    return PAGE if by_text(model.device) and model.network.dtype in DTYPES else BLOCK


class Store:
    """Room for the keys and values of `blocks` blocks of `size` tokens, in every layer; taken when a layer first writes."""

    def __init__(self, blocks: int, size: int = BLOCK):
        self.blocks, self.size = blocks, size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, at: int, k_NKD: Tensor, v_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """[blocks x size, KV, D] twice, for what looks like these."""
        if at not in self._layers:
            slots = self.blocks * self.size
            self._layers[at] = (k_NKD.new_empty(slots, *k_NKD.shape[1:]), v_NKD.new_empty(slots, *v_NKD.shape[1:]))
        return self._layers[at]

    def copy(self, source: int, target: int) -> None:
        """One block as another, in every layer."""
        size = self.size
        for pair in self._layers.values():
            for one in pair:
                one[target * size : (target + 1) * size] = one[source * size : (source + 1) * size]

    @property
    def nbytes(self) -> int:
        """That it takes once it is full."""
        return sum(one.nbytes for pair in self._layers.values() for one in pair)


class Pages:
    """One step: for each text its blocks, how many of its tokens lie in them by now, and how many new ones come.

    `places_N` are the positions of the new tokens, end to end, and `slots_N` where their keys and values go. `plainly` says why
    layers were attended to in plain torch, where `varlen_attn` might have been asked.
    """

    def __init__(
        self,
        store: Store,
        tables: Sequence[Sequence[int]],
        before: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
    ):
        self.store, self.plainly = store, set[str]()
        firsts = [0]
        for table in tables:
            firsts.append(firsts[-1] + len(table))
        self.tables = torch.tensor([block for table in tables for block in table], dtype=torch.int32)
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        inside_N = torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)
        places_N = torch.tensor(before).repeat_interleave(sizes) + inside_N
        self.first_N, self.seen_N = torch.tensor(firsts[:-1]).repeat_interleave(sizes), places_N + 1
        blocks_N = self.tables[self.first_N + places_N // store.size].long()
        slots_N = blocks_N * store.size + places_N % store.size
        self.places_N, self.slots_N = torch.stack([places_N, slots_N]).to(device)
        self.texts = texts_of(tables, before, lengths, device) if by_text(device) else None
        if self.texts is None:
            self.tables, self.first_N, self.seen_N = (
                one.to(device) for one in (self.tables, self.first_N, self.seen_N)
            )

    def attend(self, layer: int | None, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, rules: Rules) -> Tensor:
        """[N, H, D]: keep the keys and values of the new tokens, and let each see its text up to itself."""
        if not rules.causal or layer is None:
            raise ValueError("only a causal model whose layers have numbers writes")
        keys_SKD, values_SKD = self.store.layer(layer, k_NKD, v_NKD)
        keys_SKD.index_copy_(0, self.slots_N, k_NKD)
        values_SKD.index_copy_(0, self.slots_N, v_NKD)
        if self.texts is not None:
            return attend_texts(q_NHD, keys_SKD, values_SKD, self.texts, rules, self.store.size, self.plainly)
        return attend_pages(
            q_NHD, keys_SKD, values_SKD, self.tables, self.first_N, self.seen_N, self.store.size,
            scale=rules.scale, window=rules.window, softcap=rules.softcap, sinks_H=rules.sinks,
        )  # fmt: skip


class Standing(Pages):
    """A step whose numbers lie on the device and change there from one step to the next; `varlen_attn` must cover all of it."""

    def __init__(self, store: Store, places_N: Tensor, slots_N: Tensor, texts: Texts):
        self.store, self.plainly = store, set()
        self.places_N, self.slots_N, self.texts = places_N, slots_N, texts


def attend_texts(
    q_NHD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, texts: Texts, rules: Rules, size: int, plainly: set[str]
) -> Tensor:
    """[N, H, D] by `varlen_attn` where it covers that, else in plain torch, and why is added to `plainly`."""
    why = why_plainly(q_NHD, keys_SKD, values_SKD, rules) or (None if size == PAGE else f"pages of {size} tokens")
    if why is None:
        return attend_varlen(q_NHD, keys_SKD, values_SKD, texts, rules)
    plainly.add(why)
    return attend_by_text(q_NHD, keys_SKD, values_SKD, texts, rules, size)


@torch.no_grad()
def read_pages(model: LoadedModel, ids_N: Tensor, pages: Pages) -> Tensor:
    """[N, E]: the last hidden states of a step's tokens."""
    network = model.network
    inputs = {"input_ids": ids_N[None], "position_ids": pages.places_N[None], "segments": pages}
    if hasattr(network.config, "use_cache"):
        inputs["use_cache"] = False
    with packed_attention(network):
        states_NE: Tensor = network.base_model(**inputs).last_hidden_state[0]
        return states_NE


def writes_by_pages(model: LoadedModel) -> bool:
    """Whether reading a text in two steps, beside another, gives the states of reading it at once: tried once."""
    if model.pages is None:
        model.pages = _try(model) if model.spec.kind == "decoder" and packs(model) else 0
    return model.pages > 0


@torch.no_grad()
def _try(model: LoadedModel) -> int:
    """Bytes that a token takes; 0 where it goes wrong."""
    from luthier.models.packed import hidden_states

    vocabulary = model.network.get_input_embeddings().weight.shape[0]
    ids_N = (torch.arange(9 + 13, device=model.device) * 7 + 3) % min(vocabulary, 1000)
    one, other = ids_N[:9], ids_N[9:]
    training = model.module.training
    model.module.eval()
    try:
        whole_NE = hidden_states(model, ids_N, (9, 13)).float()
        store, tables = Store(4, page_size(model)), [[2], [0]]
        first = Pages(store, tables, [0, 0], [5, 13], model.device)
        read_pages(model, torch.cat([one[:5], other]), first)
        states_NE = read_pages(model, one[5:], Pages(store, tables[:1], [5], [4], model.device)).float()
        model.plainly = tuple(sorted(first.plainly)) if first.texts is not None else None
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
        # The family's attention has no number of its layer, or keeps something else of what came before.
        return 0
    finally:
        model.module.train(training)
    apart = float((states_NE - whole_NE[5:9]).abs().max())
    alike = apart <= TOLERANCE[model.network.dtype] * float(whole_NE.abs().max())
    return store.nbytes // (store.blocks * store.size) if alike else 0


def next_logits(model: LoadedModel, states_NE: Tensor) -> Tensor:
    """[N, V] in fp32, of states that predict a token each."""
    return head_of(model).logits(states_NE).float()
