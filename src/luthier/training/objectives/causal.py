"""Next-token loss, with logits only where something is learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from luthier.models.spec import LoadedModel
from torch import Tensor

from luthier.data.batches import Batch
from luthier.training.objectives.part import Loss


def causal_loss(model: LoadedModel, batch: Batch) -> Loss:
    """Sum of -weight x log p(token | tokens before it), fp32.

    No attention mask is passed: rows are padded on the right, and a causal model never looks there.
    """
    learned = batch.weights_BT[:, 1:] > 0
    logits_NV = supervised_logits(model, batch.ids_BT, learned)
    nll_N = F.cross_entropy(logits_NV.float(), batch.ids_BT[:, 1:][learned], reduction="none")
    return Loss((nll_N * batch.weights_BT[:, 1:][learned]).sum(), batch.weight)


def supervised_logits(model: LoadedModel, ids_BT: Tensor, learned: Tensor) -> Tensor:
    """Logits [N, V] that predict the N tokens where `learned` [B, T-1] is true.

    The head is applied to those places alone where that gives what the model's own forward gives (some families
    scale or cap their logits); the answer is found once for each module, and kept on it.
    """
    module = model.module
    direct = getattr(module, "_luthier_direct_head", None)
    if direct is None:
        direct = module._luthier_direct_head = _head_is_plain(module, ids_BT[:1, :16])
    if not direct:
        return module(input_ids=ids_BT, use_cache=False).logits[:, :-1][learned]
    hidden_BTE = module.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return module.get_output_embeddings()(hidden_BTE[:, :-1][learned])


@torch.no_grad()
def _head_is_plain(module: torch.nn.Module, ids_BT: Tensor) -> bool:
    head = module.get_output_embeddings()
    if head is None or module.base_model is module:
        return False
    training = module.training
    module.eval()
    try:
        whole = module(input_ids=ids_BT, use_cache=False).logits
        hidden = module.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        return hidden.shape[-1] == head.weight.shape[1] and torch.allclose(head(hidden), whole, atol=1e-4, rtol=1e-4)
    finally:
        module.train(training)
