"""How much memory training will take, before it takes it."""

from __future__ import annotations

from luthier.models.facts import read_facts
from luthier.models.spec import LoadedModel

# Values of one layer kept for the backward pass, for each token and unit of width: Korthikanti et al. 2022,
# arXiv:2205.05198, section 4, count 34 bytes at 16 bit without the attention matrix (which fused attention never
# keeps), so 17 values.
KEPT_PER_UNIT = 17
# Logits, their softmax and its gradient, in fp32.
KEPT_PER_LOGIT = 3


def estimate_memory(
    model: LoadedModel, *, trainable: int, batch_tokens: int, optimizer_slots: float = 2
) -> dict[str, int]:
    """Predicted peak in bytes, by part and in `total`, for `batch_tokens` tokens in one forward and backward pass.

    `optimizer_slots` are the values an optimiser keeps beside each weight: 2 for Adam, 1 for momentum, and 1 for an
    average of the weights. An estimate: logits are counted for every token, though the causal loss computes them only
    where something is learned.
    """
    facts = read_facts(model.network)
    held = (*model.module.parameters(), *model.module.buffers())
    weights = sum(one.numel() * one.element_size() for one in held)
    logits = facts.vocabulary if model.spec.task in ("causal", "masked", "seq2seq") else 0
    found = {
        "weights": weights,
        "gradients": 4 * trainable,
        "optimizer": round(4 * optimizer_slots * trainable),
        "activations": 4 * KEPT_PER_UNIT * batch_tokens * facts.hidden * facts.layers,
        "logits": 4 * KEPT_PER_LOGIT * batch_tokens * logits,
    }
    return {**found, "total": sum(found.values())}
