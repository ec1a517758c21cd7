"""Faster forms of the parts of a layer, put into an unmodified transformers model for as long as it is trained.

Recognised by what they hold, and kept only if they give what the part's own forward gives: RMS norms, gated MLPs, and
attention with rotary positions. All else runs as the family wrote it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Literal, Protocol, TypedDict

import torch
from torch import Tensor, nn

from luthier.core.events import Events
from luthier.models.adapters.inject import project
from luthier.models.attention import NAME, Rules, attend_flat
from luthier.models.segments import Segments
from luthier.models.spec import LoadedModel
from luthier.native.layers import RMSNorm, Rotate, SwiGLU, usable, why_none

# What a faster form may differ by, relative to the largest value: rounding in another place.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
TRIED = 6


def fuse(model: LoadedModel, events: Events | None = None) -> int:
    """Put faster forms into `model`, in place; returns how many. They are of use on the CPU, in bf16 or fp32."""
    weight = next(model.network.parameters())
    if not usable(weight):
        trouble = why_none()
        if trouble is not None and weight.device.type == "cpu" and events is not None:
            events.choose("fused", "nothing", trouble)
        return 0
    found: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for module in model.network.modules():
        for name, recognise in (("norms", _norm), ("MLPs", _mlp), ("attentions", _attention)):
            forward = recognise(module)
            if forward is False:
                other[name] += 1
            elif forward is not None:
                module.forward = MethodType(forward, module)
                found[name] += 1
    if found and events is not None:
        events.choose("fused", _list(found), "they give what the model's own parts give, in fewer passes")
    if other and events is not None:
        events.choose(
            "not fused", _list(other), "a faster form gives something else, so they stay as the family wrote them"
        )
    return found.total()


def unfuse(model: LoadedModel) -> None:
    """Give every part its own forward back."""
    for module in model.network.modules():
        forward = vars(module).get("forward")
        if getattr(forward, "__func__", None) in FORMS.values():
            del module.forward


class FusedPart(TypedDict):
    """The faster form of a part, and what it reads of its module beside what the family put there; made of JSON."""

    form: str
    held: dict[str, float]


def fused_parts(model: LoadedModel) -> dict[str, FusedPart]:
    """Which parts of `model` have a faster form, by name, each as `fuse_as` takes it."""
    found: dict[str, FusedPart] = {}
    for name, module in model.network.named_modules():
        form = getattr(getattr(vars(module).get("forward"), "__func__", None), "__name__", None)
        if form in FORMS:
            held = {key: one for key, one in vars(module).items() if key.startswith("luthier_")}
            found[name] = {"form": form, "held": held}
    return found


def fuse_as(model: LoadedModel, parts: Mapping[str, FusedPart]) -> None:
    """Put in the faster forms that another model of this shape was found to allow."""
    for name, part in parts.items():
        module = model.network.get_submodule(name)
        module.forward = MethodType(FORMS[part["form"]], module)
        vars(module).update(part["held"])


class _Norm(Protocol):
    """A module that `norm_forward` is a method of; `_norm` puts the last two into it."""

    weight: Tensor
    luthier_eps: float
    luthier_shift: float


class _MLP(Protocol):
    """A module that `mlp_forward` is a method of."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


def norm_forward(self: _Norm, hidden_states: Tensor) -> Tensor:
    """RMS norm in one pass."""
    return _norm_rows(hidden_states, self.weight, self.luthier_eps, self.luthier_shift)


def _norm_rows(x: Tensor, weight: Tensor, eps: float, shift: float) -> Tensor:
    y: Tensor = RMSNorm.apply(x, weight, eps, shift)  # type: ignore[no-untyped-call]
    return y


def mlp_forward(self: _MLP, x: Tensor) -> Tensor:
    """down(silu(gate(x)) up(x)) without the tensors between."""
    gate_NF, up_NF = project(x.flatten(0, -2), (self.gate_proj, self.up_proj))
    y_NE: Tensor = self.down_proj(SwiGLU.apply(gate_NF, up_NF))  # type: ignore[no-untyped-call]
    return y_NE.view(*x.shape[:-1], -1)


def attention_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention over segments with positions turned in place; as the family wrote it where there are none."""
    segments: Segments | None = kwargs.get("segments")
    if segments is None or args or self.config._attn_implementation != NAME:
        own: tuple[Tensor, None] = type(self).forward(self, hidden_states, *args, **kwargs)
        return own
    cosine, sine = kwargs["position_embeddings"]
    size, flat_NE = self.head_dim, hidden_states[0]
    made = project(flat_NE, (self.q_proj, self.k_proj, self.v_proj))
    q_NHD, k_NKD, v_NKD = (one.view(len(flat_NE), -1, size) for one in made)
    if hasattr(self, "q_norm"):
        q_NHD, k_NKD = self.q_norm(q_NHD), self.k_norm(k_NKD)
    q_NHD, k_NKD = (Rotate.apply(one, cosine[0], sine[0]) for one in (q_NHD, k_NKD))  # type: ignore[no-untyped-call]
    rules = Rules(True, self.scaling, getattr(self, "sliding_window", None))
    out_NHD = attend_flat(q_NHD, k_NKD, v_NKD, segments, rules, getattr(self, "layer_idx", None))
    return self.o_proj(out_NHD.reshape(len(flat_NE), -1))[None], None


FORMS = {form.__name__: form for form in (norm_forward, mlp_forward, attention_forward)}


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


# Each gives the faster form; None where the part is no such part, and False where it looks like one and computes otherwise.


def _norm(module: nn.Module) -> Callable[..., Any] | Literal[False] | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parts = dict(module.named_parameters(recurse=False))
    if "RMSNorm" not in type(module).__name__ or set(parts) != {"weight"} or not isinstance(eps, float):
        return None
    weight = parts["weight"]
    x = torch.randn(TRIED, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    for shift in (0.0, 1.0):  # Gemma's weights are kept as their distance from one
        with torch.no_grad():
            if _close(_norm_rows(x, weight, eps, shift), module(x)):
                vars(module).update(luthier_eps=eps, luthier_shift=shift)
                return norm_forward
    return False


def _mlp(module: Any) -> Callable[..., Any] | Literal[False] | None:
    children = {name for name, _ in module.named_children()}
    if not {"gate_proj", "up_proj", "down_proj"} <= children or not children <= {
        "gate_proj", "up_proj", "down_proj", "act_fn"
    }:  # fmt: skip
        return None
    x = torch.randn(TRIED, _width(module.gate_proj), generator=torch.Generator().manual_seed(0))
    x = x.to(module.gate_proj.weight.dtype)
    with torch.no_grad():
        return mlp_forward if _close(mlp_forward(module, x), type(module).forward(module, x)) else False


def _attention(module: Any) -> Callable[..., Any] | Literal[False] | None:
    """An attention with four projections, rotary positions in halves, and nothing else but norms of q and k."""
    children = {name for name, _ in module.named_children()}
    needed = {"q_proj", "k_proj", "v_proj", "o_proj"}
    if not needed <= children or not children <= needed | {"q_norm", "k_norm"}:
        return None
    if getattr(module, "attention_dropout", 0.0) or not hasattr(module, "scaling") or not hasattr(module, "head_dim"):
        return None
    if not getattr(module, "is_causal", False) or getattr(module, "attn_logit_softcapping", None) is not None:
        return None
    generator = torch.Generator().manual_seed(0)
    weight = module.q_proj.weight
    x = torch.randn(1, TRIED, _width(module.q_proj), generator=generator).to(weight.dtype)
    angle = torch.randn(1, TRIED, module.head_dim // 2, generator=generator)
    positions = tuple(torch.cat([one, one], -1).to(weight.dtype) for one in (angle.cos(), angle.sin()))
    kwargs = {"position_embeddings": positions, "attention_mask": None, "segments": Segments((TRIED - 2, 2))}
    config, own = module.config, module.config._attn_implementation
    config._attn_implementation = NAME
    try:
        with torch.no_grad():
            alike = _close(attention_forward(module, x, **kwargs)[0], type(module).forward(module, x, **kwargs)[0])
    except (TypeError, KeyError, AttributeError, RuntimeError):
        return None
    finally:
        config._attn_implementation = own
    return attention_forward if alike else False


def _close(ours: Tensor, own: Tensor) -> bool:
    return float((ours - own).float().abs().max()) <= TOLERANCE[own.dtype] * float(own.float().abs().max())


def _width(linear: Any) -> int:
    return int(linear.weight.shape[1])
