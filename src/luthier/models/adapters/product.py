"""The product of a linear layer with small matrices beside it, as one function with its own backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LoraProduct(torch.autograd.Function):
    """x W.T + bias + scale (x A.T) B.T in the precision of x, in as few passes as there are products.

    W is frozen: no gradient of its size is made. Beside x, which its neighbours keep too, only x A.T is kept, [N, rank].
    """

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        a, b = a_RI.to(x_NI.dtype), b_OR.to(x_NI.dtype)
        low_NR = x_NI @ a.T
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, low_NR)
        ctx.scale = scale
        return nn.functional.linear(x_NI, weight_OI, bias_O).addmm_(low_NR, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, a_RI, b_OR, low_NR = ctx.saved_tensors
        (grad_NO,) = grads
        a, b = a_RI.to(x_NI.dtype), b_OR.to(x_NI.dtype)
        back_NR = (grad_NO @ b).mul_(ctx.scale)
        grad_x = (grad_NO @ weight_OI).addmm_(back_NR, a) if ctx.needs_input_grad[0] else None
        grad_a = (back_NR.T @ x_NI).to(a_RI.dtype)
        grad_b = (grad_NO.T @ low_NR).to(b_OR.dtype).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None
