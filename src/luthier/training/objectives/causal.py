"""Next-token loss, with logits only where something is learned, and never all of them at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.data.batches import Batch
from luthier.models.spec import LoadedModel
from luthier.training.objectives.part import Loss

# Logits of one chunk, in numbers: 16 MB in fp32, which stays in a large cache.
CHUNK = 4 * 2**20


def causal_loss(model: LoadedModel, batch: Batch) -> Loss:
    """Sum of -weight x log p(token | tokens before it), fp32.

    No attention mask is passed: rows are padded on the right, and a causal model never looks there.
    """
    module = model.module
    learned = batch.weights_BT[:, 1:] > 0
    target_N, weight_N = batch.ids_BT[:, 1:][learned], batch.weights_BT[:, 1:][learned]
    if not _head_is_plain(module, batch.ids_BT):
        logits_NV = module(input_ids=batch.ids_BT, use_cache=False).logits[:, :-1][learned]
        return Loss(cross_entropy(logits_NV, target_N, weight_N), batch.weight)
    hidden_BTE = module.base_model(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
    hidden_NE = hidden_BTE[:, :-1][learned]
    head = module.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None:
        total = LinearCrossEntropy.apply(hidden_NE, head.weight, target_N, weight_N)
    else:
        total = cross_entropy(head(hidden_NE), target_N, weight_N)
    return Loss(total, batch.weight)


def cross_entropy(logits_NV: Tensor, target_N: Tensor, weight_N: Tensor) -> Tensor:
    """The plain form: sum of weight x -log softmax(logits)[target]."""
    return (F.cross_entropy(logits_NV.float(), target_N, reduction="none") * weight_N).sum()


class LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy(hidden_NE @ weight_VE.T, target_N, weight_N)` in chunks of rows, gradients made on the way.

    The logits are needed twice, for the loss and for its gradient, and are by far the largest tensor of a small
    model; a chunk of them is made, turned into its gradient in place, and dropped. Sums are fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, weight_VE: Tensor, target_N: Tensor, weight_N: Tensor) -> Tensor:
        rows = max(32, CHUNK // weight_VE.shape[0])
        total = hidden_NE.new_zeros((), dtype=torch.float32)
        want_hidden, want_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden_NE = torch.empty_like(hidden_NE) if want_hidden else None
        grad_weight_VE = torch.zeros_like(weight_VE, dtype=torch.float32) if want_weight else None
        for start in range(0, hidden_NE.shape[0], rows):
            chunk_CE = hidden_NE[start : start + rows]
            target_C1 = target_N[start : start + rows, None]
            weight_C1 = weight_N[start : start + rows, None].float()
            logits_CV = F.linear(chunk_CE, weight_VE).float()
            gold_C1 = logits_CV.gather(1, target_C1)
            top_C1 = logits_CV.amax(1, keepdim=True)
            share_CV = logits_CV.sub_(top_C1).exp_()
            mass_C1 = share_CV.sum(1, keepdim=True)
            total += ((mass_C1.log() + top_C1 - gold_C1) * weight_C1).sum()
            if not (want_hidden or want_weight):
                continue
            grad_CV = share_CV.mul_(weight_C1 / mass_C1)
            grad_CV.scatter_add_(1, target_C1, -weight_C1)
            grad_CV = grad_CV.to(weight_VE.dtype)
            if grad_hidden_NE is not None:
                torch.mm(grad_CV, weight_VE, out=grad_hidden_NE[start : start + rows])
            if grad_weight_VE is not None:
                grad_weight_VE.addmm_(grad_CV.t().to(grad_weight_VE.dtype), chunk_CE.to(grad_weight_VE.dtype))
        ctx.save_for_backward(grad_hidden_NE, grad_weight_VE)
        ctx.weight_dtype = weight_VE.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden_NE, weight_VE = ctx.saved_tensors
        return (
            None if hidden_NE is None else hidden_NE * grad.to(hidden_NE.dtype),
            None if weight_VE is None else (weight_VE * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def _head_is_plain(module: nn.Module, ids_BT: Tensor) -> bool:
    """Whether the head on the last hidden state gives what the module's own forward gives.

    Some families scale, cap or shift their logits. Found once for each module by trying, and kept on it.
    """
    known = getattr(module, "_luthier_plain_head", None)
    if known is None:
        known = module._luthier_plain_head = _try_head(module, ids_BT[:1, :16])  # type: ignore[assignment]
    return bool(known)


@torch.no_grad()
def _try_head(module: Any, ids_BT: Tensor) -> bool:
    head = module.get_output_embeddings()
    if head is None or module.base_model is module:
        return False
    training = module.training
    module.eval()
    try:
        whole = module(input_ids=ids_BT, use_cache=False).logits
        hidden = module.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        if hidden.shape[-1] != head.weight.shape[1]:
            return False
        return torch.allclose(head(hidden), whole, atol=1e-4, rtol=1e-4)
    finally:
        module.train(training)
