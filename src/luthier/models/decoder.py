"""What a transformers decoder computes, read off its modules: for families whose layers are Llama-like, or GPT-2-like.

Recognised by what the parts hold and give, not by name of family; what is read is only worth something once its logits were
compared with the model's own (`engine.native` does), for a forward can do more than its parts show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.models.adapters.additions import Addition
from luthier.models.adapters.freeze import find_layers
from luthier.models.adapters.inject import LoraLinear, shape_of
from luthier.models.output import Head, head_of
from luthier.models.quantised.linear import AnyLinear, QuantisedLinear
from luthier.models.rules import TOLERANCE, TRIED, Unlike, read_rules
from luthier.models.spec import LoadedModel
from luthier.native.plain import activate
from luthier.native.shape import ACTIVATIONS, PRODUCTS, Activation, Block, Decoder, Linear, Low, Norm, Turns

LANE, LARGEST_HEAD = 16, 256


@torch.no_grad()
def describe(model: LoadedModel, *, apart: bool = False) -> Decoder:
    """The decoder that a loaded language model is, with its adapter in its weights, or `apart` where it can be: then they can
    be read anew as it learns. Raises Unlike, with what the model has that a `Decoder` has not."""
    training = model.module.training
    # What is dropped at random would look like what a layer does.
    model.module.eval()
    try:
        return _describe(model, apart)
    finally:
        model.module.train(training)


def _describe(model: LoadedModel, apart: bool) -> Decoder:
    network, config = model.network, model.network.config
    if model.spec.kind != "decoder" or model.spec.task != "causal":
        raise Unlike("is no decoder that writes")
    head = head_of(model)
    if not isinstance(head, Head):
        raise Unlike("makes its logits in a way of its own")
    base = network.base_model
    layers = list(find_layers(model)[1])
    attention = _part(layers[0], "self_attn", "attn")
    heads = int(config.num_attention_heads)
    size = int(getattr(attention, "head_dim", None) or config.hidden_size // heads)
    embedding = network.get_input_embeddings()
    shapes = {tuple(_shape(one) for one in (*qkv, *out, *up, *down)) for qkv, out, up, down in map(_linears, layers)}
    if len(shapes) > 1:
        raise Unlike("has layers of several sizes")
    turns = _turns(base, model.spec.max_length)
    rules = read_rules(model, len(layers))
    blocks = tuple(_block(layer, turns, size, one.window, apart) for layer, one in zip(layers, rules))
    kv = (sum(_shape(one)[0] for one in _qkv(attention)) // size - heads) // 2
    mlp = layers[0].mlp
    decoder = Decoder(
        blocks=blocks,
        heads=heads,
        kv=kv,
        size=size,
        scale=rules[0].scale,
        activation=_activation(mlp),
        gated=_gated(mlp),
        embedding_VE=_table(embedding),
        last=_norm(_part(base, "norm", "final_layernorm", "ln_f", "final_layer_norm")),
        head=Linear(partial(_head_weight, model), head.bias_V, parts=lambda: [_head_weight(model)]),
        softcap=rules[0].softcap,
        parallel=_parallel(layers[0]),
        residual=float(getattr(layers[0], "residual_multiplier", 1.0)),
        embedding_scale=_embedding_scale(model, layers[0], embedding),
        places_PE=_table(base.wpe) if hasattr(base, "wpe") else None,
        head_scale=head.scale,
        head_softcap=head.softcap,
    )
    inner = _shape(_linears(layers[0])[3][0])[1]
    for what, number in (("states", decoder.width), ("heads", size), ("inner states", inner)):
        if number % LANE:
            raise Unlike(f"has {what} of {number} numbers, which is no multiple of {LANE}")
    made = sum(_shape(one)[0] for one in _qkv(attention))
    turned = {one.turns.tables(1)[0].shape[1] for one in blocks if one.turns is not None}
    if len(turned) > 1 or 2 * max(turned, default=0) > size:
        raise Unlike(f"turns heads of {size} numbers in a way of its own")
    if size > LARGEST_HEAD or kv < 1 or heads % kv or made != (heads + 2 * kv) * size:
        raise Unlike(f"has {heads} heads of {size} numbers in a way of its own")
    return decoder


def _block(layer: Any, turns: Callable[[Any], Turns | None], size: int, window: int | None, apart: bool) -> Block:
    attention = _part(layer, "self_attn", "attn")
    qkv, out, up, down = _linears(layer)
    # Where a norm stands goes by its name, and these names came one after another.
    names = {name for name, _ in layer.named_children()}
    before = _part(layer, "input_layernorm", "ln_1") if names & {"input_layernorm", "ln_1"} else None
    after, into, end = None, None, None
    if "pre_feedforward_layernorm" in names:
        after, into, end = (
            layer.post_attention_layernorm,
            layer.pre_feedforward_layernorm,
            layer.post_feedforward_layernorm,
        )
    elif "post_feedforward_layernorm" in names:
        after, end = layer.post_attention_layernorm, layer.post_feedforward_layernorm
    elif "ln_2" in names:
        into = layer.ln_2
    elif "post_attention_layernorm" in names:
        into = layer.post_attention_layernorm
    known = {"self_attn", "attn", "mlp", "input_layernorm", "ln_1", "ln_2", "post_attention_layernorm",
             "pre_feedforward_layernorm", "post_feedforward_layernorm"}  # fmt: skip
    others = {name for name in names - known if any(True for _ in getattr(layer, name).parameters())}
    if others:
        raise Unlike(f"has layers with {', '.join(sorted(others))}")
    query, key = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    norms = [None if one is None or isinstance(one, nn.Identity) else _norm(one) for one in (query, key)]
    if any(one is not None and len(one.weight_E) != size for one in norms):
        raise Unlike("has norms over all queries or keys together")
    norm_before = None if before is None else _norm(before)
    return Block(
        qkv=_linear(qkv, apart),
        out=_linear(out, apart),
        up=_linear(up, apart),
        down=_linear(down, apart),
        before_attention=norm_before,
        query=norms[0],
        key=norms[1],
        after_attention=None if after is None else _norm(after),
        # Where both branches read the same, they share a norm.
        before_mlp=norm_before if into is None and _parallel(layer) else None if into is None else _norm(into),
        after_mlp=None if end is None else _norm(end),
        turns=turns(layer) if getattr(attention, "use_rope", True) else None,
        window=window,
    )


def lows_of(model: LoadedModel, layers: Mapping[str, Addition]) -> list[dict[str, list[Low]]]:
    """What an adapter adds to the products of each layer of a model that was described. Raises Unlike where it adds something
    elsewhere."""
    names = {id(module): name for name, module in model.network.named_modules()}
    found, left = [], set(layers)
    for layer in find_layers(model)[1]:
        products: dict[str, list[Low]] = {}
        for product, modules in zip(PRODUCTS, _linears(layer)):
            start = 0
            for module in modules:
                stop, name = start + _shape(module)[0], names[id(module)]
                if name in layers:
                    one = layers[name]
                    left.discard(name)
                    products.setdefault(product, []).append(Low(start, stop, one.a_RI, one.b_OR * one.scale))
                start = stop
        found.append(products)
    if left:
        raise Unlike(f"adds to {min(left)}, which is none of the products of a layer")
    return found


def _part(module: Any, *names: str) -> Any:
    """The first of these that it has."""
    for name in names:
        if getattr(module, name, None) is not None:
            return getattr(module, name)
    raise Unlike(f"has no {' or '.join(names)} where Llama-like models have one")


def _parallel(layer: Any) -> bool:
    names = {name for name, _ in layer.named_children()}
    return names & {"ln_2", "post_attention_layernorm", "post_feedforward_layernorm"} == set() or bool(
        getattr(layer, "use_parallel_residual", False)
    )


def _linears(layer: Any) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """The layers that make queries, keys and values, that mix the heads, that go up and that go down."""
    attention, mlp = _part(layer, "self_attn", "attn"), layer.mlp
    out = _part(attention, "o_proj", "dense", "c_proj", "out_proj")
    return _qkv(attention), [out], _ups(mlp), [_part(mlp, "down_proj", "fc2", "c_proj")]


def _base(module: Any) -> AnyLinear:
    """The layer under an adapter. Raises Unlike for one of another kind."""
    base: AnyLinear = module.base if isinstance(module, LoraLinear) else module
    if type(base) not in (nn.Linear, Conv1D) and not isinstance(base, QuantisedLinear):
        raise Unlike(f"has layers of a kind of their own ({type(base).__name__})")
    return base


def _shape(module: Any) -> tuple[int, int]:
    """(out, in): a quantised layer would make its weight to tell."""
    base = _base(module)
    return (base.out_features, base.in_features) if isinstance(base, nn.Linear) else shape_of(base)


def _weight(module: Any, apart: bool = False) -> Tensor:
    """[out, in] as the layer multiplies, with what an adapter adds to it unless that is kept apart."""
    if isinstance(module, LoraLinear):
        return _weight(module.base) if apart and _is_plain(module) else module.whole()
    if isinstance(module, QuantisedLinear):
        return module.rebuilt(torch.float32)
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _is_plain(module: Any) -> bool:
    """Whether what it adds is scale x B A."""
    return type(module).forward is LoraLinear.forward


def _linear(modules: Sequence[Any], apart: bool) -> Linear:
    """Of layers that read the same: what they give, one after another."""
    widths = [_shape(module)[0] for module in modules]
    biases = [module.bias for module in modules]
    bias_N = None
    if any(one is not None for one in biases):
        bias_N = torch.cat(
            [torch.zeros(width) if one is None else one.detach().float() for width, one in zip(widths, biases)]
        )
    lows = partial(_lows, modules, widths) if apart else tuple

    def parts() -> list[Tensor]:
        return [_weight(module, apart) for module in modules]

    return Linear(lambda: torch.cat(parts()), bias_N, lows, parts)


def _lows(modules: Sequence[Any], widths: Sequence[int]) -> list[Low]:
    found, start = [], 0
    for module, width in zip(modules, widths):
        if isinstance(module, LoraLinear) and _is_plain(module):
            found.append(Low(start, start + width, module.lora_a.detach(), module.lora_b.detach() * module.scale))
        start += width
    return found


def _qkv(attention: Any) -> list[Any]:
    for name in ("qkv_proj", "c_attn"):
        if hasattr(attention, name):
            return [getattr(attention, name)]
    return [_part(attention, name) for name in ("q_proj", "k_proj", "v_proj")]


def _gated(mlp: Any) -> bool:
    return hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj")


def _ups(mlp: Any) -> list[Any]:
    if hasattr(mlp, "gate_up_proj"):
        return [mlp.gate_up_proj]
    if hasattr(mlp, "gate_proj"):
        return [mlp.gate_proj, _part(mlp, "up_proj")]
    return [_part(mlp, "up_proj", "fc1", "c_fc")]


def _activation(mlp: Any) -> Activation:
    """By what it gives."""
    own = _part(mlp, "act_fn", "activation_fn", "act")
    # Far out too, where some are cut off.
    x = torch.cat([torch.linspace(-4, 4, 101), torch.tensor([-20.0, 20.0])])
    for name in ACTIVATIONS:
        if torch.allclose(own(x), activate(name, x), atol=1e-4):
            return name
    raise Unlike(f"has an activation of its own ({type(own).__name__})")


def _norm(module: Any) -> Norm:
    """RMS norm with its weight or one more than it, or layer norm: by what it gives."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float):
        raise Unlike(f"has norms of their own ({type(module).__name__})")
    weight_E, bias = weight.detach().float(), getattr(module, "bias", None)
    bias_E = None if bias is None else bias.detach().float()
    # Away from zero, or layer norm and RMS norm give nearly the same.
    x = torch.randn(TRIED, len(weight_E), generator=torch.Generator().manual_seed(0)) + 1
    own = module(x.to(weight.dtype)).float()
    width = x.shape[-1:]
    forms = [Norm("rms", eps, weight_E), Norm("rms", eps, weight_E + 1), Norm("layer", eps, weight_E, bias_E)]
    if bias_E is not None:
        forms = forms[2:]
    apart = []
    for form in forms:
        made = (
            nn.functional.rms_norm(x, width, form.weight_E, eps)
            if form.kind == "rms"
            else nn.functional.layer_norm(x, width, form.weight_E, form.bias_E, eps)
        )
        apart.append(float((made - own).abs().max()))
    # The nearest: beside a weight of 100, one more or less is little.
    least = min(apart)
    if not least <= TOLERANCE * float(own.abs().max()):
        raise Unlike(f"has norms of their own ({type(module).__name__})")
    return forms[apart.index(least)]


def _turns(base: Any, longest: int) -> Callable[[Any], Turns | None]:
    """For each layer the rotary positions it is given; one table for all that are given the same. Raises Unlike where those
    of a text of `longest` tokens begin otherwise than those of a short one: what is kept of its tokens would be of neither."""
    rotary = getattr(base, "rotary_emb", None)
    if rotary is None:
        return lambda layer: None
    kinds: dict[Any, Turns] = {}
    config = base.config
    types = getattr(config, "layer_types", None)

    def of(layer: Any) -> Turns:
        attention = _part(layer, "self_attn", "attn")
        kind = types[attention.layer_idx] if types is not None else None
        # Gemma 3 asks for the tables of a kind of layer; the others have one.
        own = kind if hasattr(rotary, f"{kind}_inv_freq") else None
        if own not in kinds:
            # The long one first, for some go back to what they were only at a short one.
            far, near = _rotate(rotary, own, [0, 1, longest - 1]), _rotate(rotary, own, [0, 1])
            if not all(torch.allclose(one[:2], other, atol=1e-5) for one, other in zip(far, near)):
                raise Unlike("makes other rotary positions for long texts")
            start = "" if own is None else f"{own}_"
            speeds, scaling = (getattr(rotary, start + name, None) for name in ("inv_freq", "attention_scaling"))
            known = (speeds, scaling) if isinstance(speeds, Tensor) and isinstance(scaling, int | float) else None
            kinds[own] = Turns(partial(_tables, rotary, own), longest, known)
            kinds[own].tables(2)
        return kinds[own]

    return of


@torch.no_grad()
def _tables(rotary: Any, kind: str | None, places: int) -> tuple[Tensor, Tensor]:
    cosine, sine = _rotate(rotary, kind, range(places))
    half = cosine.shape[-1] // 2
    if places > 1 and not torch.equal(cosine[:, :half], cosine[:, half:]):
        raise Unlike("pairs neighbours in its rotary positions")
    return cosine[:, :half].contiguous(), sine[:, :half].contiguous()


@torch.no_grad()
def _rotate(rotary: Any, kind: str | None, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    extra = {} if kind is None else {"layer_type": kind}
    cosine, sine = rotary(torch.zeros(1), torch.tensor([list(places)]), **extra)
    return cosine[0], sine[0]


def _table(embedding: Any) -> Tensor:
    if not isinstance(embedding, nn.Embedding):
        raise Unlike(f"has embeddings of a kind of their own ({type(embedding).__name__})")
    return embedding.weight.detach()


@torch.no_grad()
def _embedding_scale(model: LoadedModel, first: Any, embedding: Any) -> float:
    """By what the first layer is given for a token, against its row of the table."""
    given: list[Tensor] = []
    handle = first.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((args[0] if args else kwargs["hidden_states"])[0, 0].float()),
        with_kwargs=True,
    )
    try:
        model.network(input_ids=torch.tensor([[TRIED]], device=model.device))
    finally:
        handle.remove()
    row_E = embedding.weight[TRIED].float()
    if hasattr(model.network.base_model, "wpe"):
        given[0] = given[0] - model.network.base_model.wpe.weight[0].float()
    scale = float(given[0] @ row_E / (row_E @ row_E))
    if float((given[0] - row_E * scale).abs().max()) > TOLERANCE * float(given[0].abs().max()):
        raise Unlike("does more to its embeddings than scale them")
    return 1.0 if abs(scale - 1) < 1e-3 else scale


def _head_weight(model: LoadedModel) -> Tensor:
    head = head_of(model)
    assert isinstance(head, Head)
    return head.weight_VE.detach()
