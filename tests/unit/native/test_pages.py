"""Attention over blocks: the kernel gives what plain torch gives, and what a token gets depends on nothing beside it."""

import pytest
import torch

from luthier.native.pages import attend_pages, naive_attend_pages

BLOCK = 8


def made(dtype, heads=6, kv=2, size=20, tokens=9, seed=0):
    draw = torch.Generator().manual_seed(seed)
    contexts = [1, 3, 8, 9, 31, 32, 33, 5, 70][:tokens]
    tables, first = [], []
    free = torch.randperm(64, generator=draw).tolist()
    for seen in contexts:
        first.append(len(tables))
        tables += [free.pop() for _ in range(-(-seen // BLOCK))]
    new = lambda *shape: torch.randn(*shape, generator=draw).to(dtype)  # noqa: E731
    return (
        new(tokens, heads, size), new(64 * BLOCK, kv, size), new(64 * BLOCK, kv, size),
        torch.tensor(tables, dtype=torch.int32), torch.tensor(first), torch.tensor(contexts), BLOCK,
    )  # fmt: skip


RULES = [
    {"scale": 0.3},
    {"scale": 0.2, "window": 5},
    {"scale": 0.5, "softcap": 3.0},
    {"scale": 0.3, "sinks_H": torch.linspace(-1, 2, 6)},
    {"scale": 0.3, "window": 12, "softcap": 2.0, "sinks_H": torch.linspace(-1, 2, 6)},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_kernel_gives_what_plain_torch_gives(dtype, tolerance, rules):
    given = made(dtype)
    ours, plain = attend_pages(*given, **rules), naive_attend_pages(*given, **rules)
    assert ours.dtype == dtype
    assert torch.allclose(ours.float(), plain.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_alone_gets_the_same_bits(dtype):
    q, keys, values, tables, first, seen, block = made(dtype)
    together = attend_pages(q, keys, values, tables, first, seen, block, scale=0.3)
    for at in range(len(q)):
        alone = attend_pages(
            q[at : at + 1], keys, values, tables, first[at : at + 1], seen[at : at + 1], block, scale=0.3
        )
        assert torch.equal(alone[0], together[at])


def test_plain_torch_is_causal_attention_of_the_last_token():
    q, keys, values, tables, first, seen, block = made(torch.float32)
    at = 4
    slots = [int(tables[first[at] + p // block]) * block + p % block for p in range(int(seen[at]))]
    k, v = (one[slots].transpose(0, 1)[None] for one in (keys, values))
    right = torch.nn.functional.scaled_dot_product_attention(q[at][None, :, None], k, v, scale=0.3, enable_gqa=True)
    ours = naive_attend_pages(q, keys, values, tables, first, seen, block, scale=0.3)[at]
    assert torch.allclose(ours, right[0, :, 0], atol=1e-6)
