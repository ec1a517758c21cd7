"""`torch.nn.attention.varlen.varlen_attn` as it is documented, in plain torch: with what FlashAttention 2 demands of its tensors
(flash_api.cpp of torch 2.13) held as assertions. Written from the documentation, not from `luthier.models.varlen`; and what
tests of it share."""

import itertools
import math
from contextlib import contextmanager

import torch

import luthier.models.varlen as varlen
from decoders import decoder_model
from luthier.engine.engine import Engine

# Wider than a page, so that texts have several.
LENGTH = 1024
LONG = {"max_position_embeddings": LENGTH}
COVERED = {
    "llama": {}, "qwen3": {}, "gemma": {}, "mistral": {"sliding_window": 40}, "gemma3_text": {"sliding_window": 300},
    "starcoder2": {}, "phi3": {}, "granite": {},
}  # fmt: skip

CALLS = []
"""(max_q, window, texts) of each call since `on_the_cpu` began."""


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    count = len(cu_seq_q) - 1
    (tokens, heads, width), (pages, page, kv, _) = query.shape, key.shape
    assert key.shape == value.shape and key.dtype == value.dtype == query.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert page % 256 == 0 and width % 8 == 0 and width <= 256 and heads % kv == 0
    assert enable_gqa or heads == kv
    for numbers, shape in ((cu_seq_q, (count + 1,)), (cu_seq_k, (count + 1,)), (seqused_k, (count,))):
        assert numbers.dtype == torch.int32 and numbers.is_contiguous() and numbers.shape == shape
    assert block_table.dtype == torch.int32 and block_table.stride(-1) == 1 and len(block_table) == count
    assert num_splits == 1 and isinstance(max_q, int) and isinstance(max_k, int)
    starts, used = cu_seq_q.tolist(), seqused_k.tolist()
    assert starts[0] == 0 and starts[-1] == tokens
    assert max(used) <= max_k <= block_table.shape[1] * page and min(used) > 0
    assert max(stop - start for start, stop in itertools.pairwise(starts)) <= max_q
    assert int(block_table.min()) >= 0 and int(block_table.max()) < pages
    CALLS.append((max_q, window_size, count))
    left, right = window_size
    scale = width**-0.5 if scale is None else scale
    out = torch.empty_like(query)
    for at in range(count):
        start, stop, seen = starts[at], starts[at + 1], used[at]
        k, v = (one[block_table[at].long()].flatten(0, 1)[:seen].double() for one in (key, value))
        k, v = (one.repeat_interleave(heads // kv, 1) for one in (k, v))
        scores = torch.einsum("thd,phd->htp", query[start:stop].double() * scale, k)
        for row in range(stop - start):
            place = seen - (stop - start) + row  # the last query is at the last key
            for other in range(seen):
                if (left >= 0 and other < place - left) or (right >= 0 and other > place + right):
                    scores[:, row, other] = -math.inf
        out[start:stop] = torch.einsum("htp,phd->thd", scores.softmax(-1), v).to(query.dtype)
    return out


@contextmanager
def on_the_cpu(monkeypatch, dtypes=(torch.float32, torch.bfloat16)):
    """Inside, a model on the processor takes the ways of one on a CUDA device, with the above in the place of FlashAttention."""
    CALLS.clear()
    varlen.why_not.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
        patch.setattr(varlen, "DEVICES", ("cuda", "cpu"))
        patch.setattr(varlen, "DTYPES", dtypes)
        patch.setattr("luthier.models.pages.DTYPES", dtypes)
        yield CALLS
    varlen.why_not.cache_clear()


def model_of(family, **more):
    model = decoder_model(family, **more)
    model.spec = model.spec.model_copy(update={"stop_ids": (), "max_length": LENGTH})
    return model


def written(model, given, sampling, *, waves=((0, 10**6),), room=8192, **settings):
    engine = Engine(model, room, **settings)
    requests, left = [], list(given)
    for steps, count in waves:
        for _ in range(steps):
            engine.step()
        for _ in range(min(count, len(left))):
            requests.append(engine.add(left.pop(0), sampling))
    engine.run()
    assert engine.blocks.used == 0
    return [one.written for one in requests], engine
