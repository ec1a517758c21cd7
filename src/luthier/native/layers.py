"""The parts of a layer between its matrix products, as autograd functions over the C kernels.

Each has its twin in plain torch (`naive_...`), which is what runs where there is no library, and what tests compare with.
Tensors are contiguous, on the CPU, in bf16 or fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.native.build import NoLibrary, load_library

SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
LONG, FLOAT, POINTER = ctypes.c_long, ctypes.c_float, ctypes.c_void_p
SIGNATURES = {
    "rms_forward": (POINTER, POINTER, POINTER, POINTER, LONG, LONG, FLOAT, FLOAT),
    "rms_backward": (POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, LONG, LONG, FLOAT),
    "swiglu_forward": (POINTER, POINTER, POINTER, LONG),
    "swiglu_backward": (POINTER, POINTER, POINTER, POINTER, POINTER, LONG),
    "rotate": (POINTER, POINTER, POINTER, LONG, LONG, LONG, FLOAT),
    "cross_entropy": (POINTER, POINTER, POINTER, POINTER, LONG, LONG),
    "log_shares": (POINTER, POINTER, POINTER, POINTER, LONG, LONG, LONG),
    "mask_rows": (POINTER, POINTER, POINTER, *(LONG,) * 4),
    "draw_rows": (*(POINTER,) * 4, *(LONG,) * 3),
    "attend_pages": (*(POINTER,) * 8, *(LONG,) * 5, FLOAT, LONG, FLOAT),
    "seen_softmax": (POINTER, POINTER, POINTER, *(LONG,) * 6, FLOAT),
    "seen_softmax_backward": (POINTER, POINTER, POINTER, POINTER, *(LONG,) * 6, FLOAT),
}


_meta_is_cpu = False


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: on the CPU, all bf16 or all fp32, and there is a library."""
    dtype = tensors[0].dtype
    here = ("cpu", "meta") if _meta_is_cpu else ("cpu",)
    fit = dtype in SUFFIX and all(one.dtype == dtype and one.device.type in here for one in tensors)
    return fit and why_none() is None


@contextmanager
def meta_as_cpu() -> Iterator[None]:
    """Inside, tensors on torch's meta device take the ways of those on the CPU: kernels are passed over, but what they
    would need and return is made. See `models.rehearsal`."""
    global _meta_is_cpu
    _meta_is_cpu, before = True, _meta_is_cpu
    try:
        yield
    finally:
        _meta_is_cpu = before


@cache
def why_none() -> str | None:
    """Why there is no library, as a sentence; None where there is one."""
    try:
        load_library()
    except NoLibrary as why:
        return str(why)
    return None


def kernel(name: str, like: Tensor) -> Any:
    """The kernel for tensors such as `like`; for those without values, one that does nothing."""
    return _nothing if like.is_meta else _kernel(name, like.dtype)


def _nothing(*args: Any) -> None:
    pass


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    function = getattr(load_library(), f"{name}_{SUFFIX[dtype]}")
    function.argtypes, function.restype = SIGNATURES[name], None
    return function


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * (shift + weight), over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_E: Tensor, eps: float, shift: float) -> Tensor:
        x, width = x.contiguous(), x.shape[-1]
        rows = x.numel() // width
        y, inverse_R = torch.empty_like(x), torch.empty(rows, device=x.device)
        kernel("rms_forward", x)(
            x.data_ptr(), weight_E.data_ptr(), y.data_ptr(), inverse_R.data_ptr(), rows, width, eps, shift
        )
        ctx.save_for_backward(x, weight_E, inverse_R)
        ctx.shift = shift
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_E, inverse_R = ctx.saved_tensors
        gy, width = grads[0].contiguous(), x.shape[-1]
        gx = torch.empty_like(x)
        sums = torch.zeros(load_library().threads(), width, device=x.device) if ctx.needs_input_grad[1] else None
        kernel("rms_backward", x)(
            gy.data_ptr(), x.data_ptr(), weight_E.data_ptr(), inverse_R.data_ptr(), gx.data_ptr(),
            None if sums is None else sums.data_ptr(), len(inverse_R), width, ctx.shift,
        )  # fmt: skip
        return gx, None if sums is None else sums.sum(0).to(weight_E.dtype), None, None


def naive_rms_norm(x: Tensor, weight_E: Tensor, eps: float, shift: float) -> Tensor:
    """The same in plain torch."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (shift + weight_E.float())).to(x.dtype)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        kernel("swiglu_forward", gate)(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel())
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gy, grad_gate, grad_up = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        kernel("swiglu_backward", gate)(
            gy.data_ptr(), gate.data_ptr(), up.data_ptr(), grad_gate.data_ptr(), grad_up.data_ptr(), gate.numel()
        )
        return grad_gate, grad_up


def naive_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The same in plain torch."""
    return F.silu(gate) * up


class Rotate(torch.autograd.Function):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), in place: x [N, H, D], cosine and sine [N, D], halves paired
    as Llama pairs them."""

    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cosine_ND: Tensor, sine_ND: Tensor) -> Tensor:
        ctx.save_for_backward(cosine_ND, sine_ND)
        ctx.mark_dirty(x_NHD)
        _rotate(x_NHD, cosine_ND, sine_ND, 1.0)
        return x_NHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_NHD = grads[0].contiguous() if not grads[0].is_contiguous() else grads[0].clone()
        _rotate(grad_NHD, *ctx.saved_tensors, -1.0)  # type: ignore[call-arg]
        return grad_NHD, None, None


def _rotate(x_NHD: Tensor, cosine_ND: Tensor, sine_ND: Tensor, sign: float) -> None:
    kernel("rotate", x_NHD)(x_NHD.data_ptr(), cosine_ND.data_ptr(), sine_ND.data_ptr(), *x_NHD.shape, sign)


def naive_rotate(x_NHD: Tensor, cosine_ND: Tensor, sine_ND: Tensor) -> Tensor:
    """The same in plain torch, not in place."""
    first, second = x_NHD.chunk(2, -1)
    return x_NHD * cosine_ND[:, None] + torch.cat([-second, first], -1) * sine_ND[:, None]


def cross_entropy_(logits_NV: Tensor, target_N: Tensor, weight_N: Tensor) -> Tensor:
    """[N]: -log softmax(logits)[target] in fp32; the logits become weight x (softmax - one-hot), their gradient."""
    loss_N = torch.empty(len(target_N), device=logits_NV.device)
    target_N, weight_N = target_N.contiguous(), weight_N.float().contiguous()
    kernel("cross_entropy", logits_NV)(
        logits_NV.data_ptr(), target_N.data_ptr(), weight_N.data_ptr(), loss_N.data_ptr(), *logits_NV.shape
    )
    return loss_N


def naive_cross_entropy_(logits_NV: Tensor, target_N: Tensor, weight_N: Tensor) -> Tensor:
    """The same in plain torch."""
    wide_NV = logits_NV.float()
    loss_N = F.cross_entropy(wide_NV, target_N, reduction="none")
    share_NV = wide_NV.softmax(-1)
    share_NV[torch.arange(len(target_N)), target_N] -= 1
    logits_NV.copy_(share_NV * weight_N[:, None])
    return loss_N
