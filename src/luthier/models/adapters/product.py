"""The products of linear layers with small matrices beside them, as one function with its own backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Factors(NamedTuple):
    """One layer: y = x W.T + bias + scale (x A.T) B.T, with W [O, I] frozen, A [R, I], B [O, R]."""

    weight_OI: Tensor
    bias_O: Tensor | None
    a_RI: Tensor
    b_OR: Tensor
    scale: float


def low_rank_products(x_NI: Tensor, layers: Sequence[Factors]) -> tuple[Tensor, ...]:
    """The outputs [N, O] of layers that read the same x, in the precision of x."""
    tensors = [one for layer in layers for one in layer[:4]]
    scales = tuple(layer.scale for layer in layers)
    outs: tuple[Tensor, ...] = LowRankProducts.apply(x_NI, scales, *tensors)  # type: ignore[no-untyped-call]
    return outs


class LowRankProducts(torch.autograd.Function):
    """Several layers over one x (the queries, keys and values of an attention; gate and up of an MLP) in as few products.

    W is frozen: no gradient of its size is made. The A of all layers lie in one matrix, and so do the x A.T, of which
    [N, sum of ranks] is all that is kept beside x, which its neighbours keep too; the gradient of x is added up in place.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, scales: tuple[float, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, biases, a_s, b_s = (tensors[at::4] for at in range(4))
        dtype, ranks = x_NI.dtype, [len(a_RI) for a_RI in a_s]
        a_QI = (torch.cat(a_s) if len(a_s) > 1 else a_s[0]).to(dtype)
        scaled = [(b_OR * scale if scale != 1 else b_OR).to(dtype) for b_OR, scale in zip(b_s, scales)]
        low_NQ = x_NI @ a_QI.T
        outs = [
            nn.functional.linear(x_NI, weight_OI, bias_O).addmm_(low_NR, b_OR.T)
            for weight_OI, bias_O, low_NR, b_OR in zip(weights, biases, torch.split(low_NQ, ranks, 1), scaled)
        ]
        ctx.save_for_backward(x_NI, low_NQ, a_QI, *weights, *scaled)
        ctx.scales, ctx.ranks, ctx.learned = scales, ranks, (a_s[0].dtype, b_s[0].dtype)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, low_NQ, a_QI, *others = ctx.saved_tensors
        count = len(ctx.ranks)
        weights, scaled = others[:count], others[count:]
        back_NQ = x_NI.new_empty(len(x_NI), sum(ctx.ranks))
        for back_NR, grad_NO, b_OR in zip(torch.split(back_NQ, ctx.ranks, 1), grads_NO, scaled):
            torch.mm(grad_NO, b_OR, out=back_NR)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grads_NO[0] @ weights[0]
            for grad_NO, weight_OI in zip(grads_NO[1:], weights[1:]):
                grad_x.addmm_(grad_NO, weight_OI)
            grad_x.addmm_(back_NQ, a_QI)
        grads_a = torch.split((back_NQ.T @ x_NI).to(ctx.learned[0]), ctx.ranks)
        # low.T @ g takes two thirds of the time of g.T @ low.
        grads_b = [
            (low_NR.T @ grad_NO).T.to(ctx.learned[1]).mul_(scale)
            for low_NR, grad_NO, scale in zip(torch.split(low_NQ, ctx.ranks, 1), grads_NO, ctx.scales)
        ]
        made = [one for pair in zip(grads_a, grads_b) for one in (None, None, *pair)]
        return grad_x, None, *made
