"""From last hidden states to logits, as the model's family makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from luthier.core.errors import ModelError
from luthier.models.parallel import is_shared
from luthier.models.spec import LoadedModel

# Tokens on which a head is compared with its model's own forward, and what rounding may change, relative to the logits.
TRIED = 8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3, torch.float64: 1e-6}


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap x tanh(scale x (states @ weight.T + bias) / cap), without the cap when it is None."""

    weight_VE: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """[N, V]"""
        return self.finish(nn.functional.linear(hidden_NE, self.weight_VE, self.bias_V))

    def finish(self, logits_NV: Tensor) -> Tensor:
        """[N, V]: the product of states and weight as logits."""
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


@dataclass(frozen=True, slots=True)
class OwnHead:
    """What the model's own forward makes of last hidden states, whatever its family does to them."""

    module: Any

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """[N, V]"""
        body, inside = self.module.base_model, set(self.module.base_model.modules())
        # T5 and OPT call what is inside the body past the body itself. What ModernBERT calls its decoder is its head.
        parts = [getattr(self.module, name)() for name in ("get_encoder", "get_decoder") if hasattr(self.module, name)]
        bodies = {body, *(part for part in parts if part in inside)} - {self.module}
        with ExitStack() as held:
            for one in bodies:
                held.enter_context(_giving(one, hidden_NE[None]))
            ids_1N = torch.zeros(1, len(hidden_NE), dtype=torch.long, device=hidden_NE.device)
            logits_NV: Tensor = self.module(**_inputs(self.module, ids_1N)).logits[0]
            return logits_NV


@dataclass(frozen=True, slots=True)
class Tempered:
    """A head whose logits are divided by a temperature after its soft-cap."""

    head: Head | OwnHead
    module: Any
    temperature: float

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """[N, V]"""
        return self.head.logits(hidden_NE) / self.temperature


AnyHead: TypeAlias = Head | OwnHead | Tempered


def at_temperature(model: LoadedModel, temperature: float) -> AnyHead:
    """The head of a loaded language model with its logits over `temperature`: what is drawn from, as a likelihood."""
    head = head_of(model)
    if temperature == 1:
        return head
    if isinstance(head, Head) and head.softcap is None:
        return replace(head, scale=head.scale / temperature)
    return Tempered(head, model.module, temperature)


def head_of(model: LoadedModel) -> Head | OwnHead:
    """The head of a loaded language model, read once for each output layer. Raises ModelError as `read_head` does."""
    layer = model.module.get_output_embeddings()  # type: ignore[operator]
    if model.head is None or model.head[0] is not layer:
        model.head = (layer, read_head(model.module))
    head = model.head[1]
    # Read anew each time: a sharded weight is another tensor while its model computes.
    return replace(head, weight_VE=layer.weight, bias_V=layer.bias) if isinstance(head, Head) else head


@torch.no_grad()
def read_head(module: Any) -> Head | OwnHead:
    """The head of a language model: a matrix with the scale and soft-cap that the config names (Cohere, Granite, Gemma 2
    and their kin) where that gives what the model's own forward gives, else that forward's last part.

    Raises ModelError when neither does.
    """
    vocabulary, training = module.get_input_embeddings().weight.shape[0], module.training
    ids_1N = (torch.arange(TRIED, device=module.device)[None] * 5 + 3) % min(vocabulary, 1000)
    module.eval()
    try:
        inputs = _inputs(module, ids_1N)
        own_NV = module(**inputs).logits[0].float()
        both = module.config.is_encoder_decoder
        hidden_NE = (decoder_states(module, ids_1N, None, ids_1N) if both else module.base_model(**inputs)[0])[0]
        for head in (_matrix(module), OwnHead(module)):
            if head is not None and _agrees(head, hidden_NE, own_NV):
                return head
    finally:
        module.train(training)
    raise ModelError(
        f"{module.config.model_type}: the logits of this family are not made from its last hidden states, so it cannot be "
        "tuned or scored here; choose a model of another family"
    )


def decoder_states(module: Any, ids_ST: Tensor, mask_ST: Tensor | None, target_SM: Tensor) -> Tensor:
    """[S, M, E]: the last hidden states of an encoder-decoder's decoder, given source and target ids."""
    source_STE = module.get_encoder()(input_ids=ids_ST, attention_mask=mask_ST)[0]
    decoder = module.get_decoder()
    states_SME: Tensor = decoder(
        input_ids=target_SM, encoder_hidden_states=source_STE, encoder_attention_mask=mask_ST, use_cache=False
    )[0]
    return states_SME


def _inputs(module: Any, ids_1N: Tensor) -> dict[str, Tensor]:
    both = module.config.is_encoder_decoder
    return {"input_ids": ids_1N, **({"decoder_input_ids": ids_1N} if both else {})}


def _matrix(module: Any) -> Head | None:
    layer, config = module.get_output_embeddings(), module.config
    # A part of the rows gives a part of the logits: the model's own forward puts them together.
    if type(layer) is not nn.Linear or is_shared(module):
        return None
    times, over = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    scale = float(times or 1.0) / float(over or 1.0)
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def _agrees(head: Head | OwnHead, hidden_NE: Tensor, own_NV: Tensor) -> bool:
    if isinstance(head, Head) and head.weight_VE.shape != (own_NV.shape[1], hidden_NE.shape[1]):
        return False
    found_NV = head.logits(hidden_NE).float()
    limit = TOLERANCE[hidden_NE.dtype] * float(own_NV.abs().max())
    return found_NV.shape == own_NV.shape and float((found_NV - own_NV).abs().max()) <= limit


class _Given(tuple[Tensor]):
    """What a body returns: its last hidden states by place or by name, and None for all else that heads pass on."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _giving(body: nn.Module, hidden_1NE: Tensor) -> Iterator[None]:
    """Inside, `body` gives these states instead of computing any."""
    own = vars(body).get("forward")
    body.forward = lambda *args, **kwargs: _Given((hidden_1NE,))
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own
