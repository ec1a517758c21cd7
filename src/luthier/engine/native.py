"""The native decoder as a reader of the engine: whether a model can take it, in which form, and what that costs in quality."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.engine.adapters import OWN
from luthier.engine.sampling import Execution
from luthier.models.decoder import describe
from luthier.models.facts import base_fingerprint
from luthier.models.mapped import by_layers, letting_go
from luthier.models.memory import out_of_memory, return_freed_memory, shown
from luthier.models.output import Head, head_of
from luthier.models.packed import hidden_states
from luthier.models.quantised.network import quantised_layers
from luthier.models.rules import Unlike
from luthier.models.spec import LoadedModel
from luthier.native.cached import Cached
from luthier.native.forms import Form
from luthier.native.library import TOKENS, why_no_decoder
from luthier.native.packed import Packed
from luthier.native.shape import Decoder

# Smaller models are read as they are: their products are too small to gain much.
SMALL = 1_000_000
# Tokens to write, below which packing the weights takes longer than it saves.
WORTH = 1024
# What a form may change on assets/calibration.txt: nats of KL divergence a token on average, and a share of perplexity.
MOST_KL, MOST_PERPLEXITY = 0.01, 0.01
SHORT = "memory ran out while the weights were packed, so the module itself reads, slower"
# Rows of the head that are multiplied with at once.
VOCABULARY = 8192
# What bf16 and int8 change of the logits at most, relative to their size; a model that computes anything else is far beyond.
MOST_APART = 0.1
# By how much int8 keys and values may multiply the KL divergence of int4 weights.
MOST_ADDED = 1.1


@dataclass(frozen=True, slots=True)
class Own:
    """Tokens, the model's last hidden states after each, and how it makes logits of them."""

    ids: list[int]
    states_TE: Tensor
    head: Any
    let_go: Callable[[], None] = lambda: None
    """Gives back what the head read of a file."""

    def logits(self, states_TE: Tensor) -> Tensor:
        """[T, V], by a part of the vocabulary after another: libraries copy a matrix in another order to multiply with it."""
        head = self.head
        if not isinstance(head, Head):
            return head.logits(states_TE)  # type: ignore[no-any-return]
        parts = []
        for start in range(0, len(head.weight_VE), VOCABULARY):
            rows = slice(start, start + VOCABULARY)
            bias_V = None if head.bias_V is None else head.bias_V[rows]
            parts.append(replace(head, weight_VE=head.weight_VE[rows], bias_V=bias_V).logits(states_TE))
            self.let_go()
        return torch.cat(parts, 1)


@dataclass(frozen=True, slots=True)
class Quality:
    """What a form changes of a model's predictions on the calibration text."""

    kl: float
    """KL divergence from the model's own, nats a token."""
    perplexity: float
    """Change of perplexity, as a share."""
    apart: float
    """Distance of the centred logits, relative to their size."""

    @property
    def close(self) -> bool:
        """Whether that is next to nothing."""
        return self.kl <= MOST_KL and self.perplexity <= MOST_PERPLEXITY and self.apart <= MOST_APART

    def __str__(self) -> str:
        return f"KL {self.kl:.4f} nats a token, perplexity {self.perplexity:+.2%}"


def prepare(model: LoadedModel, execution: Execution, events: Events) -> None:
    """Choose how `model` is read when it writes, put the packed weights into it, and say so.

    auto: int8 if the model is not small and stays what it is within the limits above, else bf16 if that does, else as it is. A
    form that is asked for is taken, and what it changes is said. Beside int8, keys and values are int8 too within the same
    limits, else bf16; beside int4 where they add next to nothing to what its weights change. Where memory runs out, auto leaves
    the model as it is, and warns. Raises ConfigError for a form that this model or machine cannot take.
    """
    if execution == "model" or model.native is not None:
        return
    parameters = sum(one.numel() for one in model.network.parameters())
    if execution == "auto" and parameters < SMALL:
        events.choose(
            "native", "no", f"a model of {parameters / 1e6:.1f} M parameters gains little from packed weights"
        )
        return
    try:
        decoder = _describe(model)
        own = _own(model)
        chosen: tuple[Packed, Quality] | None = _choose(model, decoder, own, execution)
    except Unlike as why:
        if execution != "auto":
            raise ConfigError(
                f"execution: {execution} needs the native decoder, and {why}; set execution: auto"
            ) from None
        events.choose("native", "no", f"{why}; the module itself reads")
        return
    except (MemoryError, RuntimeError) as err:
        if not out_of_memory(err):
            raise
        chosen = None
    if chosen is None:
        # Out here nothing holds what was packed by then.
        return_freed_memory(model.device)
        if execution != "auto":
            raise ConfigError(
                f"execution: {execution}: memory ran out while the weights were packed; set execution: model, or choose a "
                "smaller model or a machine with more memory"
            )
        events.choose("native", "no", "memory ran out while the weights were packed; the module itself reads")
        events.warn(SHORT, 1)
        return
    packed, quality = chosen
    packed.quality = quality
    model.native = packed
    say_packed(packed, events)


def say_packed(packed: Packed, events: Events) -> None:
    """In which form a model is read, and what that changes."""
    why = f"{packed.quality}; {packed.nbytes / 1e6:,.0f} MB of weights; keys and values in {packed.kept}"
    events.choose("engine", f"native {packed.form}", why)


def limits() -> list[float]:
    """By what it is decided how a model is read."""
    return [SMALL, MOST_KL, MOST_PERPLEXITY, MOST_APART, MOST_ADDED]


def calibration_ids(model: LoadedModel) -> list[int]:
    """The tokens on which forms are compared."""
    text = (files("luthier") / "assets" / "calibration.txt").read_text(encoding="utf-8")
    return list(model.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])[: model.spec.max_length]


def refuse(execution: Execution, draft: str | None = None) -> None:
    """Raises ConfigError where a form or a draft is asked for, and nothing is written by the engine."""
    if draft is not None:
        raise ConfigError(
            "draft: nothing is written text by text by the engine here, so nothing is guessed; leave it out"
        )
    if execution not in ("auto", "model"):
        raise ConfigError(
            f"execution: {execution} is for language models that the engine here writes with, and nothing is written so; "
            "leave it out"
        )


def let_go(model: LoadedModel) -> None:
    """Give the memory of a packed model's own layers back: it only writes from here on."""
    if model.native is not None and not model.packed_only:
        # What an adapter for it was tuned on is asked later.
        base_fingerprint(model, letting_go(model.network))
        letting_go(model.network)()
        for module in model.network.base_model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and module is not model.network.get_input_embeddings():
                weight.data = weight.data.new_empty(0)
        model.packed_only = True


@contextmanager
def natively(model: LoadedModel, tokens: int) -> Iterator[None]:
    """Inside, a model that is tuned is read by the native decoder in bf16, where it computes in bf16 itself and so many tokens
    are worth the packing. Its adapter is kept apart from the base, so that nothing of what it learned is rounded away."""
    if model.native is not None or not _gains(model, tokens):
        yield
        return
    try:
        decoder = _describe(model, apart=True)
        packed = Packed(decoder, "bfloat16")
        packed.take_adapters([decoder])
        if model.packable is None:
            model.packable = measure(packed, _own(model)).apart <= MOST_APART
    except Unlike:
        model.packable = False
    except (MemoryError, RuntimeError) as err:
        if not out_of_memory(err):
            raise
        model.packable = False
        warnings.warn(SHORT, stacklevel=4)
    if model.packable:
        model.native = packed
    try:
        yield
    finally:
        model.native = None


def own_adapter(model: LoadedModel) -> str:
    """The name of the model's own adapter beside its packed base; "" where it has none there."""
    held = model.native is not None and model.native.adapters and model.spec.adapter is not None
    return OWN if held else ""


def packed_bytes(model: LoadedModel, tokens: int) -> int:
    """Bytes that the packed weights take while so many tokens are written `natively`."""
    if not _gains(model, tokens):
        return 0
    network = model.network
    inside = sum(one.numel() for name, one in network.named_parameters() if one.dim() == 2 and "lora_" not in name)
    # A quantised base is rebuilt to be packed.
    inside += sum(one.out_features * one.in_features for _, one in quantised_layers(network))
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    # The table of embeddings is read where it is, the head is packed.
    return int(2 * (inside if tied else inside - network.get_input_embeddings().weight.numel()))


def tell_packed(model: LoadedModel, tokens: int, events: Events) -> None:
    """Say where so many tokens are written from packed weights beside the model's own."""
    taken = packed_bytes(model, tokens)
    if taken:
        held = next((layer.form for _, layer in quantised_layers(model.network)), None)
        why = f"answers are written from a copy of the weights, of {shown(taken)}"
        if held is not None:
            why = f"answers are written from a copy of the weights, made from the base in {held}, of {shown(taken)}"
        events.choose("writing", "packed in bfloat16", why)


def _gains(model: LoadedModel, tokens: int) -> bool:
    parameters = sum(one.numel() for one in model.network.parameters())
    return (
        model.packable is not False
        and tokens >= WORTH
        and parameters >= SMALL
        and model.spec.kind == "decoder"
        and model.device.type == "cpu"
        and model.network.dtype == torch.bfloat16
        # Weights that are shared out over processes are whole in none.
        and not any(hasattr(one, "full_tensor") for one in model.network.parameters())
        and why_no_decoder() is None
    )


def _describe(model: LoadedModel, apart: bool = False) -> Decoder:
    trouble = why_no_decoder()
    if trouble is not None:
        raise Unlike(trouble)
    if model.device.type != "cpu":
        raise Unlike(f"the model is on {model.device.type}")
    try:
        with by_layers(model.network):
            return describe(model, apart=apart)
    except Unlike as why:
        raise Unlike(f"a {model.spec.family} model {why}") from None
    except (AttributeError, TypeError, KeyError) as err:
        raise Unlike(f"a {model.spec.family} model is built otherwise ({err})") from None


@torch.inference_mode()
def _own(model: LoadedModel) -> Own:
    """What the model itself says of the calibration text."""
    training = model.module.training
    model.module.eval()
    ids = calibration_ids(model)
    try:
        with by_layers(model.network) as let_go:
            return Own(ids, hidden_states(model, torch.tensor(ids), (len(ids),)), head_of(model), let_go)
    finally:
        model.module.train(training)


def _choose(model: LoadedModel, decoder: Decoder, own: Own, execution: Execution) -> tuple[Packed, Quality]:
    if execution in ("bfloat16", "int8"):
        return _try(model, decoder, execution, own)
    packed, quality = _try(model, decoder, "int8", own)
    if execution == "int4":
        packed = Packed(decoder, "int4", letting_go(model.network))
        return packed, _keep(packed, own)
    if quality.close:
        return packed, quality
    whole, other = _try(model, decoder, "bfloat16", own)
    if other.close:
        return whole, other
    raise Unlike(f"int8 changes too much ({quality}), and so does bf16 ({other})")


def _try(model: LoadedModel, decoder: Decoder, form: Form, own: Own) -> tuple[Packed, Quality]:
    """Pack, and compare. Raises Unlike where it gives other logits: the model does something that was not read off it."""
    # In memory once, not as a file's pages too.
    let_go = letting_go(model.network)
    let_go()
    packed = Packed(decoder, form, let_go)
    quality = _keep(packed, own)
    let_go()
    if not quality.apart <= MOST_APART:
        raise Unlike(
            f"a {model.spec.family} model gives other logits than its parts in {form} ({quality.apart:.2f} apart)"
        )
    return packed, quality


def _keep(packed: Packed, own: Own) -> Quality:
    """What a packed model changes; its keys and values are bytes where it stays within the limits with them, or where they add
    next to nothing to what int4 changes."""
    quality = measure(packed, own)
    if packed.kept == "bfloat16" or quality.close:
        return quality
    in_bytes, packed.kept = quality, "bfloat16"
    quality = measure(packed, own)
    if packed.form == "int4" and in_bytes.kl <= MOST_ADDED * quality.kl:
        packed.kept = "int8"
        return in_bytes
    return quality


@torch.inference_mode()
def measure(packed: Packed, own: Own) -> Quality:
    """What `packed`, with its first adapter if it has any, changes of what the model says."""
    blocks = -(-len(own.ids) // TOKENS)
    cached, adapters = Cached(packed, blocks), [0 if packed.adapters else -1]
    kl = more = apart = size = 0.0
    # A few tokens at a time: a vocabulary may be large.
    for start in range(0, len(own.ids), TOKENS):
        ids = own.ids[start : start + TOKENS]
        made_TV = cached.read(ids, [list(range(blocks))], [start], [len(ids)], list(range(len(ids))), adapters=adapters)
        own_TV, made_TV = (
            one.float().log_softmax(-1) for one in (own.logits(own.states_TE[start : start + TOKENS]), made_TV)
        )
        lost_TV = own_TV - made_TV
        kl += float((own_TV.exp() * lost_TV).sum())
        following = own.ids[start + 1 : start + 1 + len(ids)]
        more += float(lost_TV[: len(following)].gather(1, torch.tensor(following)[:, None]).sum())
        apart += float((lost_TV - lost_TV.mean(-1, keepdim=True)).square().sum())
        size += float((own_TV - own_TV.mean(-1, keepdim=True)).square().sum())
    # No number is large enough for the perplexity of a model that computes something else.
    lost = min(more / max(1, len(own.ids) - 1), 700.0)
    return Quality(kl / len(own.ids), math.exp(lost) - 1, math.sqrt(apart / size))
