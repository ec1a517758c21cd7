"""Supervised fine-tuning in plain PyTorch, to read and to check against: none of Luthier's code is used.

    python examples/sft_in_60_lines.py MODEL DATA.jsonl [STEPS]

DATA holds {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}: one question, one answer. The losses are
those of `luthier tune --objective sft --by-length false` with the same numbers; tests/parity/test_loops.py holds
the two together to 1e-6 in fp32.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH, EPOCHS, RATE, WARMUP, DECAY, CLIP, SEED = 8, 3, 5e-4, 0.05, 0.01, 1.0, 0


def encode(tokenizer, messages):
    """(ids, learned): the answer and the token that ends it are learned, everything before is context."""
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    end = start + ids[start:].index(tokenizer.eos_token_id) + 1
    return ids, [start <= at < end for at in range(len(ids))]


def train(model, tokenizer, rows, steps=None):
    """Yield the mean loss of each step; the model is trained in place."""
    encoded = [encode(tokenizer, row["messages"]) for row in rows]
    per_epoch = math.ceil(len(encoded) / BATCH)
    total = steps or EPOCHS * per_epoch
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    rise = round(WARMUP * total)
    model.train()
    for step in range(total):
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([SEED, epoch]).permutation(len(encoded))
        loss, count = 0.0, 0
        for row in order[at * BATCH : (at + 1) * BATCH]:
            ids, learned = encoded[row]
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            learned = torch.tensor(learned[1:])
            loss += F.cross_entropy(logits[learned].float(), torch.tensor(ids[1:])[learned], reduction="sum")
            count += int(learned.sum())
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * ((step + 1) / rise if step < rise else 1 - (step - rise) / max(1, total - rise))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item() / count


if __name__ == "__main__":
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    rows = [json.loads(line) for line in Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()]
    for number, value in enumerate(train(model, tokenizer, rows, int(sys.argv[3]) if sys.argv[3:] else None), 1):
        print(f"step {number}: loss {value:.6f}")
