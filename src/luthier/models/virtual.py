"""Learned vectors that a model reads before every text, in unmodified transformers models.

Virtual tokens (prompt tuning: Lester et al. 2021, arXiv:2104.08691; p-tuning: Liu et al. 2021, arXiv:2103.10385) have the
ids that follow the vocabulary's, and stand before each segment of a flat batch. A prefix (prefix tuning: Li and Liang 2021,
arXiv:2101.00190) is keys and values that every layer sees before those of the text. Hooks on the body put both in wherever
it is called, and take away the states of virtual tokens, so that nothing else needs to know of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

# What transformers calls the argument: the second, in later versions the first.
CACHE_NAMES = ("cache", "past_key_values")


class VirtualEmbedding(nn.Module):
    """The embedding of a vocabulary of V tokens, and of P learned vectors [P, E] under the ids V .. V + P - 1."""

    def __init__(self, base: nn.Embedding, learned: nn.Module, vectors: Callable[[], Tensor], count: int):
        super().__init__()
        self.base, self.count, self.vectors = base, count, vectors
        # After the base: a model's dtype is that of its first parameter, which must stay the base's.
        self.learned = learned

    @property
    def weight(self) -> Tensor:
        """[V, E]: the vectors of the vocabulary."""
        return self.base.weight

    @property
    def ids_P(self) -> Tensor:
        """The virtual tokens."""
        first = self.weight.shape[0]
        return torch.arange(first, first + self.count, device=self.weight.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape to their vectors, in the precision of the base."""
        first = self.weight.shape[0]
        found: Tensor = self.base(ids.clamp(max=first - 1))
        virtual = ids >= first
        if not virtual.any():
            return found
        return found.index_put((virtual,), self.vectors().to(found.dtype)[ids[virtual] - first])


def insert(
    network: Any, ids_N: Tensor, lengths: Sequence[int], parents: Sequence[int] = ()
) -> tuple[Tensor, Sequence[int], Tensor | None]:
    """A flat batch with the model's virtual tokens before each segment that has no parent, and which of its places hold
    text; as it is, and None, for a model that has none."""
    embedding = reader(network).get_input_embeddings()
    if not isinstance(embedding, VirtualEmbedding):
        return ids_N, lengths, None
    ids_P, pieces, more, real = embedding.ids_P, [], [], []
    for at, piece in enumerate(torch.split(ids_N, list(lengths))):
        before = len(ids_P) if not parents or parents[at] < 0 else 0
        pieces += [ids_P[:before], piece]
        more.append(before + len(piece))
        real += [torch.zeros(before, dtype=torch.bool), torch.ones(len(piece), dtype=torch.bool)]
    return torch.cat(pieces), more, torch.cat(real).to(ids_N.device)


def add_virtual_tokens(network: Any, embedding: VirtualEmbedding, *, kept: bool) -> None:
    """Let `network` read the virtual tokens before every text.

    `kept`: the states of virtual tokens stay, for a decoder that attends to them (an encoder-decoder that generates).
    """
    body = reader(network)
    body.set_input_embeddings(embedding)
    virtual = _Virtual(embedding)
    body.register_forward_pre_hook(virtual.before, with_kwargs=True)
    if kept:
        network.get_decoder().register_forward_pre_hook(_Across(embedding.count), with_kwargs=True)
    else:
        body.register_forward_hook(virtual.after, with_kwargs=True)


def add_prefix(network: Any, learned: nn.Module, prefix: Callable[[int], Any], count: int) -> None:
    """Let every layer of a decoder see `prefix(rows)`, a cache of `count` keys and values for each row."""
    reader(network).add_module("prefix", learned)
    reader(network).register_forward_pre_hook(_Prefix(prefix, count), with_kwargs=True)


def reads_packed(network: Any) -> bool:
    """Whether nothing here keeps the model from reading texts laid end to end: a prefix is one for each row."""
    return not any(isinstance(hook, _Prefix) for hook in reader(network)._forward_pre_hooks.values())


def reader(network: Any) -> Any:
    """The stack of layers that every call goes through: the encoder of an encoder-decoder, and OPT's decoder inside its
    body, which its language model calls past that."""
    if network.config.is_encoder_decoder:
        return network.get_encoder()
    found = network.get_decoder() if hasattr(network, "get_decoder") else None
    inside = found is not None and any(found is module for module in network.base_model.modules())
    return found if inside else network.base_model


class _Virtual:
    """Puts the virtual tokens on the left of a call's rows (of the first call, where several share a cache), and takes
    their states away."""

    def __init__(self, embedding: VirtualEmbedding):
        self.embedding, self.put = embedding, False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Packed texts had them put in by `insert`.
        self.put = "segments" not in kwargs and _length(_cache(kwargs)) == 0
        if "segments" in kwargs:
            return None
        args, kwargs, ids_ST = _ids(args, kwargs)
        _shift(kwargs, self.embedding.count, inside=self.put)
        if self.put:
            kwargs["input_ids"] = torch.cat([self.embedding.ids_P.expand(len(ids_ST), -1), ids_ST], 1)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # States that were given instead of computed (`models.output`) have no virtual ones among them.
        if self.put and output[0].shape[1] == kwargs["input_ids"].shape[1]:
            output["last_hidden_state"] = output[0][:, self.embedding.count :]
        return output


class _Across:
    """Lets a decoder attend to the states of the encoder's virtual tokens."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is None or states is None or mask.shape[-1] == states.shape[1]:
            return None
        return args, {**kwargs, "encoder_attention_mask": _ones_before(mask, self.count)}


class _Prefix:
    """Begins a call without a cache, or with an empty one, with the prefix in it."""

    def __init__(self, prefix: Callable[[int], Any], count: int):
        self.prefix, self.count = prefix, count

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs, ids_ST = _ids(args, kwargs)
        cache = _cache(kwargs)
        _shift(kwargs, self.count, inside=False)
        if _length(cache) == 0:
            if cache is None:
                cache = kwargs[_name_of_cache(module)] = DynamicCache()
            dtype = next(module.parameters()).dtype
            for at, layer in enumerate(self.prefix(len(ids_ST)).layers):
                cache.update(layer.keys.to(dtype), layer.values.to(dtype), at)
        return args, kwargs


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """The arguments with the ids by name, in a dict of their own."""
    kwargs = dict(kwargs)
    if args:
        kwargs["input_ids"], args = args[0], args[1:]
    return args, kwargs, kwargs["input_ids"]


def _shift(kwargs: dict[str, Any], count: int, *, inside: bool) -> None:
    """Make room on the left for `count` places: in the mask always, in positions and segments if they are `inside` this
    call's ids."""
    mask, places, types = (kwargs.get(name) for name in ("attention_mask", "position_ids", "token_type_ids"))
    if mask is not None:
        kwargs["attention_mask"] = _ones_before(mask, count)
    if places is not None:
        before = torch.arange(count, device=places.device).expand(len(places), -1)
        kwargs["position_ids"] = torch.cat([before, places + count], 1) if inside else places + count
    if types is not None and inside:
        kwargs["token_type_ids"] = nn.functional.pad(types, (count, 0))


def _ones_before(mask_ST: Tensor, count: int) -> Tensor:
    return nn.functional.pad(mask_ST, (count, 0), value=1)


def _cache(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def _name_of_cache(module: nn.Module) -> str:
    return next(name for name in CACHE_NAMES if name in signature(module.forward).parameters)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
