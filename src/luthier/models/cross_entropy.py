"""The loss of next tokens straight from hidden states: logits are made in chunks, and never all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.models.output import AnyHead, Head
from luthier.native.layers import cross_entropy_, usable

# Bytes of the logits of one chunk: enough rows for fast products (256 of 49,152 in bf16), few enough for a large cache.
CHUNK = 24 * 2**20


def token_loss(head: AnyHead, hidden_NE: Tensor, target_N: Tensor, weight_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum of -weight x log p(target), in fp32, from the states that predict the targets.

    `smoothing` spreads that share of the mass over the vocabulary (Szegedy et al. 2016, arXiv:1512.00567).
    """
    if isinstance(head, Head) and not smoothing:
        loss: Tensor = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_NE, head.weight_VE, head.bias_V, target_N, weight_N, head.scale, head.softcap
        )
        return loss
    total = hidden_NE.new_zeros((), dtype=torch.float32)
    rows = _rows(head, hidden_NE)
    for chunk in zip(torch.split(hidden_NE, rows), torch.split(target_N, rows), torch.split(weight_N, rows)):
        # Made again on the way back: only the states are kept.
        total = total + checkpoint(_chunk_loss, head, *chunk, smoothing, use_reentrant=False)
    return total


def naive_token_loss(
    head: AnyHead, hidden_NE: Tensor, target_N: Tensor, weight_N: Tensor, smoothing: float = 0.0
) -> Tensor:
    """The same from all logits at once: the reference."""
    return _chunk_loss(head, hidden_NE, target_N, weight_N, smoothing)


def token_nll(head: AnyHead, hidden_NE: Tensor, target_N: Tensor) -> Tensor:
    """[N]: -log p(target) of each, in fp32, from the states that predict them; a gradient for each token flows back.

    For losses that are no weighted sum of tokens. Logits are made once forward and once more backward, in chunks.
    """
    if isinstance(head, Head):
        nll_N: Tensor = LinearTokenNLL.apply(  # type: ignore[no-untyped-call]
            hidden_NE, head.weight_VE, head.bias_V, target_N, head.scale, head.softcap
        )
        return nll_N
    rows = _rows(head, hidden_NE)
    chunks = list(zip(torch.split(hidden_NE, rows), torch.split(target_N, rows)))
    if not torch.is_grad_enabled():
        parts = [naive_token_nll(head, *chunk) for chunk in chunks]
    else:
        parts = [checkpoint(naive_token_nll, head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts) if parts else hidden_NE.new_zeros(0, dtype=torch.float32)


def naive_token_nll(head: AnyHead, hidden_NE: Tensor, target_N: Tensor) -> Tensor:
    """The same from all logits at once: the reference."""
    return F.cross_entropy(head.logits(hidden_NE).float(), target_N, reduction="none")


def _rows(head: AnyHead, hidden_NE: Tensor) -> int:
    vocabulary = head.weight_VE.shape[0] if isinstance(head, Head) else head.module.config.vocab_size
    return max(32, CHUNK // (vocabulary * hidden_NE.element_size()))


def _chunk_loss(head: AnyHead, hidden_NE: Tensor, target_N: Tensor, weight_N: Tensor, smoothing: float) -> Tensor:
    logits_NV = head.logits(hidden_NE).float()
    return (F.cross_entropy(logits_NV, target_N, reduction="none", label_smoothing=smoothing) * weight_N).sum()


class LinearCrossEntropy(torch.autograd.Function):
    """`naive_token_loss` of a matrix head, in chunks of rows, its gradients made on the way.

    The logits are needed twice, for the loss and for its gradient, and are by far the largest tensor of a small
    model; a chunk of them is made, turned into its gradient in place, and dropped. Sums are fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        weight_N: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        rows = max(32, CHUNK // (weight_VE.shape[0] * hidden_NE.element_size()))
        total = hidden_NE.new_zeros((), dtype=torch.float32)
        want_hidden, want_weight, _ = wanted = ctx.needs_input_grad[:3]
        grad_hidden_NE, grad_weight_VE, grad_bias_V = start_gradients(wanted, hidden_NE, weight_VE, bias_V)
        plain = scale == 1.0 and softcap is None
        for start in range(0, hidden_NE.shape[0], rows):
            chunk_CE = hidden_NE[start : start + rows]
            target_C1 = target_N[start : start + rows, None]
            weight_C1 = weight_N[start : start + rows, None].float()
            logits_CV = F.linear(chunk_CE, weight_VE, bias_V)
            if plain and usable(logits_CV):
                total += (cross_entropy_(logits_CV, target_C1[:, 0], weight_C1[:, 0]) * weight_C1[:, 0]).sum()
                collect(logits_CV, chunk_CE, weight_VE, start, grad_hidden_NE, grad_weight_VE, grad_bias_V)
                continue
            logits_CV, slope_CV = _widen(logits_CV, scale, softcap)
            gold_C1 = logits_CV.gather(1, target_C1)
            top_C1 = logits_CV.amax(1, keepdim=True)
            share_CV = logits_CV.sub_(top_C1).exp_()
            mass_C1 = share_CV.sum(1, keepdim=True)
            total += ((mass_C1.log() + top_C1 - gold_C1) * weight_C1).sum()
            if not (want_hidden or want_weight):
                continue
            grad_CV = share_CV.mul_(weight_C1 / mass_C1)
            grad_CV.scatter_add_(1, target_C1, -weight_C1)
            if slope_CV is not None:
                grad_CV.mul_(slope_CV)
            if scale != 1.0:
                grad_CV.mul_(scale)
            grad_CV = grad_CV.to(weight_VE.dtype)
            collect(grad_CV, chunk_CE, weight_VE, start, grad_hidden_NE, grad_weight_VE, grad_bias_V)
        ctx.save_for_backward(grad_hidden_NE, grad_weight_VE, grad_bias_V)
        ctx.weight_dtype = weight_VE.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*scale_gradients(ctx, grads[0]), None, None, None, None)


class LinearTokenNLL(torch.autograd.Function):
    """`naive_token_nll` of a matrix head, in chunks of rows, which are made again on the way back.

    Unlike in `LinearCrossEntropy` the weight of a token is not known before the loss is, so no gradient can be made
    forward; kept are the states, and the logarithm of each token's partition sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        rows = _rows(Head(weight_VE), hidden_NE)
        nll_N = hidden_NE.new_empty(hidden_NE.shape[0], dtype=torch.float32)
        mass_N = torch.empty_like(nll_N)
        for start in range(0, hidden_NE.shape[0], rows):
            part = slice(start, start + rows)
            logits_CV, _ = _widen(F.linear(hidden_NE[part], weight_VE, bias_V), scale, softcap)
            mass_N[part] = logits_CV.logsumexp(1)
            nll_N[part] = mass_N[part] - logits_CV.gather(1, target_N[part, None]).squeeze(1)
        ctx.save_for_backward(hidden_NE, weight_VE, bias_V, target_N, mass_N)
        ctx.scale, ctx.softcap, ctx.rows = scale, softcap, rows
        return nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NE, weight_VE, bias_V, target_N, mass_N = ctx.saved_tensors
        (grad_N,) = grads
        grad_hidden_NE, grad_weight_VE, grad_bias_V = start_gradients(
            ctx.needs_input_grad[:3], hidden_NE, weight_VE, bias_V
        )
        for start in range(0, hidden_NE.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            target_C1, grad_C1 = target_N[part, None], grad_N[part, None].float()
            logits_CV, slope_CV = _widen(F.linear(hidden_NE[part], weight_VE, bias_V), ctx.scale, ctx.softcap)
            grad_CV = logits_CV.sub_(mass_N[part, None]).exp_().mul_(grad_C1)
            grad_CV.scatter_add_(1, target_C1, -grad_C1)
            if slope_CV is not None:
                grad_CV.mul_(slope_CV)
            if ctx.scale != 1.0:
                grad_CV.mul_(ctx.scale)
            wide = grad_CV.to(weight_VE.dtype)
            collect(wide, hidden_NE[part], weight_VE, start, grad_hidden_NE, grad_weight_VE, grad_bias_V)
        return (
            grad_hidden_NE,
            None if grad_weight_VE is None else grad_weight_VE.to(weight_VE.dtype),
            None if grad_bias_V is None else grad_bias_V.to(weight_VE.dtype),
            None,
            None,
            None,
        )


def _widen(logits_CV: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """(logits in fp32 with the head's scale and cap, the slope of the cap at each)."""
    logits_CV = logits_CV.float()
    if scale != 1.0:
        logits_CV.mul_(scale)
    if softcap is None:
        return logits_CV, None
    logits_CV.div_(softcap).tanh_()
    slope_CV = 1 - logits_CV**2
    return logits_CV.mul_(softcap), slope_CV


def start_gradients(
    wanted: Sequence[bool], hidden_NE: Tensor, weight_VE: Tensor, bias_V: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Room for the gradients of states, weight and bias where they are wanted; sums are in fp32."""
    want_hidden, want_weight, want_bias = wanted
    return (
        torch.empty_like(hidden_NE) if want_hidden else None,
        torch.zeros_like(weight_VE, dtype=torch.float32) if want_weight else None,
        torch.zeros_like(bias_V, dtype=torch.float32) if want_bias and bias_V is not None else None,
    )


def scale_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that a forward pass made and saved, times that of its loss."""
    hidden_NE, weight_VE, bias_V = ctx.saved_tensors
    return (
        None if hidden_NE is None else hidden_NE * grad.to(hidden_NE.dtype),
        None if weight_VE is None else (weight_VE * grad).to(ctx.weight_dtype),
        None if bias_V is None else (bias_V * grad).to(ctx.weight_dtype),
    )


def collect(
    grad_CV: Tensor,
    chunk_CE: Tensor,
    weight_VE: Tensor,
    start: int,
    grad_hidden_NE: Tensor | None,
    grad_weight_VE: Tensor | None,
    grad_bias_V: Tensor | None,
) -> None:
    """Add what the gradient of a chunk of logits means for the states, the weight and the bias."""
    if grad_hidden_NE is not None:
        torch.mm(grad_CV, weight_VE, out=grad_hidden_NE[start : start + len(grad_CV)])
    if grad_weight_VE is not None and grad_CV.dtype == torch.float32:
        grad_weight_VE.addmm_(grad_CV.T, chunk_CE)
    elif grad_weight_VE is not None:
        grad_weight_VE += grad_CV.T @ chunk_CE
    if grad_bias_V is not None:
        grad_bias_V += grad_CV.sum(0, dtype=torch.float32)
