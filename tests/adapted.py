"""What tests of adapters and of quantised bases share: tokens to read, rows to learn, and where an adapter may sit."""

import torch

IDS = torch.tensor([5, 30, 31, 32, 33, 34])
ROWS = [
    {"messages": [{"role": "user", "content": f"say {at}"}, {"role": "assistant", "content": f"{at}!"}]}
    for at in range(8)
]
TOKENS = ["<tool>", "<answer>"]
# The settings of a LoRA on the embedding and the output layer, by its own matrices, new tokens, or whole.
EDGES = [
    {"targets": ["lm_head"]},
    {"targets": ["embed_tokens"]},
    {"targets": ["embed_tokens", "lm_head", "q_proj"]},
    {"tokens": TOKENS},
    {"also": ["lm_head"]},
    {"also": ["embed_tokens"]},
]


@torch.no_grad()
def logits(loaded, ids=IDS):
    """[T, V]; an encoder-decoder reads the same ids on both sides."""
    decoder = {"decoder_input_ids": ids[None]} if loaded.spec.kind == "encoder-decoder" else {}
    return loaded.module(input_ids=ids[None], **decoder).logits[0]
