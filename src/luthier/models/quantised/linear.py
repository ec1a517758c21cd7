"""A frozen linear layer that keeps its weight in fewer bits, and rebuilds it for the moment of a product."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.models.quantised import int8, nf4
from luthier.models.quantised.int8 import rows_at_once

Form: TypeAlias = Literal["int8", "nf4"]
Packed: TypeAlias = int8.Int8 | nf4.NF4
AnyLinear: TypeAlias = nn.Linear | Conv1D
"""A layer that multiplies by one matrix, [out, in] or, GPT-2's, [in, out]."""
PACK: dict[Form, Callable[[Tensor], Packed]] = {"int8": int8.pack, "nf4": nf4.pack}
PACKED: dict[Form, type[Packed]] = {"int8": int8.Int8, "nf4": nf4.NF4}

# Values sampled from each tensor for a fingerprint: enough to tell two trainings apart, quick for billions of weights.
SAMPLES = 64


class QuantisedLinear(nn.Linear):
    """y = x W.T + bias with W frozen in int8 or NF4, and small matrices beside it if asked for.

    W is rebuilt in the precision of x, in the forward and again in the backward pass: nothing of its size is kept between
    them. To code that asks for `weight` it looks like any linear layer; what it gets is a copy, and changing that changes
    nothing. `nn.Linear` and GPT-2's `Conv1D` can be taken.
    """

    def __init__(self, linear: AnyLinear, form: Form, weight_OI: Tensor | None = None):
        """`weight_OI` is held in place of the layer's own weight, which is still what a fingerprint sees."""
        nn.Module.__init__(self)
        held: Tensor = linear.weight.detach()
        if weight_OI is None:
            weight_OI = held.T if isinstance(linear, Conv1D) else held
        self.out_features, self.in_features = weight_OI.shape
        self.form, self.dtype = form, held.dtype
        self.bias = linear.bias
        # What the fingerprint of the model looks at, as it was.
        self.original_shape, self.original_sample = tuple(held.shape), sample(held)
        parts = PACK[form](weight_OI.contiguous())
        self._names = parts._fields
        for name, part in zip(self._names, parts):
            self.register_buffer(name, part, persistent=False)
        self.requires_grad_(False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in]: rebuilt, in the precision that the model computes in."""
        return self.rebuilt(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes."""
        return sum(getattr(self, name).nbytes for name in self._names)

    def rebuilt(self, dtype: torch.dtype, *, lasting: bool = True) -> Tensor:
        """[out, in] in `dtype`; one that does not last is overwritten by the next of its thread."""
        packed = self._packed
        size = self.out_features * self.in_features
        device = getattr(self, self._names[0]).device
        flat = torch.empty(size, dtype=dtype, device=device) if lasting else _scratch(size, dtype, device)
        packed.unpack(flat)
        return flat.view(self.out_features, self.in_features)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(outputs, their rows of the weight in fp32), some at a time: for what need not see the whole weight at once."""
        together = self._packed.together(self.in_features)
        rows = together * max(1, rows_at_once(self.in_features) // together)
        for start in range(0, self.out_features, rows):
            place = slice(start, min(start + rows, self.out_features))
            count = place.stop - place.start
            flat = torch.empty(count * self.in_features, device=getattr(self, self._names[0]).device)
            self._packed.rows(place, self.in_features).unpack(flat)
            yield place, flat.view(count, self.in_features)

    @property
    def version(self) -> tuple[tuple[int, int], ...]:
        """What changes whenever the weight does."""
        return tuple((one.data_ptr(), one._version) for one in self._packed)

    @property
    def _packed(self) -> Packed:
        return PACKED[self.form]._make(getattr(self, name) for name in self._names)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out], in the precision of the input."""
        return self.beside(input, self.bias)

    def beside(
        self,
        x: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor | None = None,
        b_OR: Tensor | None = None,
        scale: float = 0.0,
    ) -> Tensor:
        """x W.T + bias with scale x (x A.T) B.T added; without, where there is no A."""
        x_NI = x.flatten(0, -2)
        y_NO: Tensor = RebuiltProduct.apply(x_NI, self, bias_O, a_RI, b_OR, scale)  # type: ignore[no-untyped-call]
        return y_NO.view(*x.shape[:-1], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        # `.to(torch.bfloat16)` rounds every floating tensor: scales stay fp32, and what is computed in is remembered.
        own = {name: getattr(self, name) for name in self._names}
        self.dtype = fn(next(iter(own.values())).new_empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, held in own.items():
            setattr(self, name, held.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}"


_kept = threading.local()


def _scratch(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for the weight of the layer at work. Room of its own for each, between what is kept for the backward pass,
    tears the heap of a processor apart: at 135 M parameters a step then takes 300 MB more than it holds."""
    if device.type == "meta":  # a rehearsal, which counts what it needs itself
        return torch.empty(size, dtype=dtype, device=device)
    rooms: dict[tuple[torch.dtype, torch.device], Tensor] = vars(_kept).setdefault("rooms", {})
    room = rooms.get((dtype, device))
    if room is None or len(room) < size:
        room = rooms[dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return room[:size]


def sample(tensor: Tensor) -> bytes:
    """Up to 64 evenly spread values of a tensor, in bf16: what a fingerprint looks at."""
    flat = tensor.reshape(-1)
    # In double precision: from 2^24 on, single precision rounds the last place to one past the end.
    places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long().to(flat.device)
    return flat[places].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()


class RebuiltProduct(torch.autograd.Function):
    """x W.T + bias + scale (x A.T) B.T, W rebuilt from its quantised form. Beside x, only x A.T [N, rank] is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        layer: QuantisedLinear,
        bias_O: Tensor | None,
        a_RI: Tensor | None,
        b_OR: Tensor | None,
        scale: float,
    ) -> Tensor:
        bias_O = bias_O if bias_O is None else bias_O.to(x_NI.dtype)
        y_NO = nn.functional.linear(x_NI, layer.rebuilt(x_NI.dtype, lasting=False), bias_O)
        ctx.layer, ctx.scale = layer, scale
        if a_RI is None or b_OR is None:
            return y_NO
        low_NR = x_NI @ a_RI.to(x_NI.dtype).T
        ctx.save_for_backward(x_NI, a_RI, b_OR, low_NR)
        return y_NO.addmm_(low_NR, b_OR.to(x_NI.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NO,) = grads
        grad_x = grad_NO @ ctx.layer.rebuilt(grad_NO.dtype, lasting=False) if ctx.needs_input_grad[0] else None
        grad_bias = grad_NO.sum(0) if ctx.needs_input_grad[2] else None
        if not ctx.saved_tensors:
            return grad_x, None, grad_bias, None, None, None
        x_NI, a_RI, b_OR, low_NR = ctx.saved_tensors
        back_NR = (grad_NO @ b_OR.to(grad_NO.dtype)).mul_(ctx.scale)
        if grad_x is not None:
            grad_x.addmm_(back_NR, a_RI.to(grad_NO.dtype))
        grad_a = (back_NR.T @ x_NI).to(a_RI.dtype)
        grad_b = (grad_NO.T @ low_NR).to(b_OR.dtype).mul_(ctx.scale)
        return grad_x, None, grad_bias, grad_a, grad_b, None
