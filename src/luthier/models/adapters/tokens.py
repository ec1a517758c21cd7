"""Tokens that are added to a model, or learned anew: their rows alone learn, in the embedding and the output layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from luthier.core.errors import ConfigError
from luthier.models.adapters.inject import edge_layers, factor_of, replace_layer, sharers
from luthier.models.quiet import quiet

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel


class TokenRows(nn.Module):
    """An embedding, or an output layer, of which the rows `ids` are replaced by rows [len(ids), dim] learned in fp32."""

    def __init__(self, base: nn.Embedding | nn.Linear, ids: Sequence[int], rows: nn.Parameter):
        super().__init__()
        self.base, self.ids = base, tuple(ids)
        # In a child after the base: a model's dtype is that of its first parameter, which must stay the base's.
        self.added = nn.ParameterDict({"lora_rows": rows})
        self.places_V: Tensor
        places_V = torch.full((self.weight.shape[0],), -1, device=self.weight.device)
        places_V[list(ids)] = torch.arange(len(ids), device=places_V.device)
        self.register_buffer("places_V", places_V, persistent=False)
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    @property
    def rows(self) -> nn.Parameter:
        """[tokens, dim]"""
        rows: nn.Parameter = self.added["lora_rows"]
        return rows

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, if it is an output layer with one."""
        return getattr(self.base, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Ids to vectors, or states to logits, in the base's precision."""
        found: Tensor = self.base(x)
        if isinstance(self.base, nn.Embedding):
            places = self.places_V[x]
            own = self.rows[places.clamp(min=0)] * factor_of(self.base)
            return torch.where((places >= 0)[..., None], own.to(found.dtype), found)
        ids = torch.tensor(self.ids, device=x.device)
        own = nn.functional.linear(x, self.rows.to(x.dtype), None if self.bias is None else self.bias[ids])
        return found.index_copy(-1, ids, own)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base with the learned rows in their places."""
        self.weight[list(self.ids)] = self.rows.to(self.weight.dtype)
        return self.base


def token_layers(network: nn.Module) -> Iterator[tuple[str, TokenRows]]:
    """(name, layer) of every layer with rows of its own; the input embedding first."""
    for name, module in network.named_modules():
        if isinstance(module, TokenRows):
            yield name, module


def add_tokens(loaded: LoadedModel, tokens: Sequence[str]) -> None:
    """Make the rows of `tokens` learn; those that the tokenizer lacks are added to it and to the model.

    A new row starts as the mean of the rows of the pieces that the token was read as before.
    """
    tokenizer, network = loaded.tokenizer, loaded.network
    if len(set(tokens)) < len(tokens) or not all(tokens):
        raise ConfigError("adapter.tokens: each token must be given once, and none may be empty")
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    pieces = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in new}
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new])
    rows = network.get_input_embeddings().weight.shape[0]
    grow(network, len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    put_rows(network, dict.fromkeys(edge_layers(network), ids))
    with torch.no_grad():
        for _, layer in token_layers(network):
            for token in new:
                begin = layer.weight[pieces[token]] if pieces[token] else layer.weight[:rows]
                layer.rows[tokens.index(token)] = begin.float().mean(0)


def put_rows(network: Any, ids_of: Mapping[str, Sequence[int]], *, apart: bool = False) -> None:
    """Let rows learn in the named layers; layers that share one weight share the rows too, unless `apart`."""
    shared: dict[int, nn.Parameter] = {}
    for name, ids in ids_of.items():
        weight: Any = network.get_submodule(name).weight
        if id(weight) in shared:
            continue
        # A copy that learns in fp32, whatever the base is in.
        rows = nn.Parameter(weight.detach()[list(ids)].float().clone())
        if not apart:
            shared[id(weight)] = rows
        wrapped: dict[int, TokenRows] = {}
        for other in [name] if apart else sharers(network, weight):
            base = network.get_submodule(other)
            layer = wrapped.setdefault(id(base), TokenRows(base, ids, rows))
            layer.train(network.training)
            replace_layer(network, other, layer)


def grow(network: Any, rows: int) -> None:
    """Give the vocabulary `rows` rows if it has less. The new ones hold zeros: what they mean is for the caller to say."""
    size = network.get_input_embeddings().weight.shape[0]
    if rows <= size:
        return
    with quiet(), torch.random.fork_rng():
        network.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in edge_layers(network).values():
            for parameter in layer.parameters():
                parameter[size:] = 0
