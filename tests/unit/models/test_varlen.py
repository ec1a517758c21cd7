"""Attention by pages as on a CUDA device: what is asked of `varlen_attn`, and the plain way beside it."""

import pytest
import torch
import torch.nn.attention.varlen

from flash import on_the_cpu
from luthier.models import varlen
from luthier.models.attention import Rules
from luthier.models.pages import Pages, Store
from luthier.native.pages import naive_attend_pages

TABLES, BEFORE, LENGTHS = [[3, 1], [5], [0, 2], [4]], [256, 0, 300, 7], [44, 5, 1, 20]


def step(size, lengths=LENGTHS, *, tables=TABLES, heads=4, kv=2, width=16, dtype=torch.float32, blocks=6):
    """A step, what its new tokens ask, and a store in which all that came before lies."""
    draw = torch.Generator().manual_seed(0)
    store = Store(blocks, size)
    new = lambda *shape: torch.randn(*shape, generator=draw).to(dtype)  # noqa: E731
    pages = Pages(store, tables, BEFORE, lengths, torch.device("cpu"))
    q, k, v = new(sum(lengths), heads, width), new(sum(lengths), kv, width), new(sum(lengths), kv, width)
    for held in store.layer(0, k, v):
        held.copy_(new(*held.shape))
    return pages, q, k, v


def right(pages, q, k, v, rules, tables=TABLES):
    """By the twin of the C kernel, token by token, from lists that are made here."""
    size, keys, values = pages.store.size, *(one.clone() for one in pages.store.layer(0, k, v))
    firsts, seen, at = [], [], 0
    first = 0
    for table, before, length in zip(tables, BEFORE, pages.texts.lengths):
        for place in range(before, before + length):
            slot = table[place // size] * size + place % size
            keys[slot], values[slot] = k[at], v[at]
            firsts.append(first)
            seen.append(place + 1)
            at += 1
        first += len(table)
    flat = torch.tensor([one for table in tables for one in table], dtype=torch.int32)
    return naive_attend_pages(
        q, keys, values, flat, torch.tensor(firsts), torch.tensor(seen), size,
        scale=rules.scale, window=rules.window, softcap=rules.softcap, sinks_H=rules.sinks,
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [LENGTHS, [1, 1, 1, 1]], ids=["some", "one"])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 7, 290])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen_attn_is_asked_for_what_the_twin_gives(monkeypatch, lengths, kv, window, dtype):
    with on_the_cpu(monkeypatch) as calls:
        pages, q, k, v = step(varlen.PAGE, lengths, kv=kv, dtype=dtype)
        rules = Rules(True, 0.3, window)
        assert varlen.why_plainly(q, k, v, rules) is None
        calls.clear()
        found = pages.attend(0, q, k, v, rules)
        assert len(calls) == 1 and not pages.plainly
        torch.testing.assert_close(
            found, right(pages, q, k, v, rules), atol=1e-5 if dtype.itemsize == 4 else 2e-2, rtol=0
        )


@pytest.mark.parametrize("size", [32, 256])
@pytest.mark.parametrize(
    "rules",
    [
        Rules(True, 0.3), Rules(True, 0.3, 9), Rules(True, 0.3, softcap=2.0), Rules(True, 0.3, 9, 2.0),
        Rules(True, 0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ],
    ids=["plain", "window", "soft-cap", "both", "sinks"],
)  # fmt: skip
def test_plain_torch_gives_what_the_twin_gives(monkeypatch, size, rules):
    tables = TABLES if size == 256 else [[3, 1, 40, 41, 42, 9, 8, 11, 12, 13], [5], list(range(20, 30)), [4]]
    with on_the_cpu(monkeypatch):
        pages, q, k, v = step(size, tables=tables, blocks=45)
        found = varlen.attend_by_text(q, *_written(pages, k, v), pages.texts, rules, size)
        torch.testing.assert_close(found, right(pages, q, k, v, rules, tables), atol=1e-5, rtol=0)


def _written(pages, k, v):
    keys, values = pages.store.layer(0, k, v)
    keys[pages.slots_N], values[pages.slots_N] = k, v
    return keys, values


def test_what_varlen_attn_does_not_cover_goes_by_plain_torch_and_is_said(monkeypatch):
    with on_the_cpu(monkeypatch) as calls:
        pages, q, k, v = step(varlen.PAGE)
        calls.clear()
        for rules in (Rules(True, 0.3, softcap=2.0), Rules(True, 0.3, sinks=torch.zeros(4))):
            found = pages.attend(0, q, k, v, rules)
            torch.testing.assert_close(found, right(pages, q, k, v, rules), atol=1e-5, rtol=0)
        assert not calls and pages.plainly == {"soft-caps", "attention sinks"}
        odd = torch.zeros(3, 2, 12)
        assert varlen.why_plainly(odd, odd, odd, Rules(True, 1.0)) == "heads of 12 numbers"
        wide = torch.zeros(3, 2, 264)
        assert varlen.why_plainly(wide, wide, wide, Rules(True, 1.0)) == "heads of 264 numbers"
        assert "different widths" in varlen.why_plainly(wide, wide, odd, Rules(True, 1.0))
    with on_the_cpu(monkeypatch, dtypes=varlen.DTYPES):
        assert varlen.why_plainly(q, k, v, Rules(True, 0.3)) == "numbers in float32"


def test_a_varlen_attn_that_is_not_what_is_expected_is_found_out(monkeypatch):
    with on_the_cpu(monkeypatch):
        assert varlen.why_not(torch.device("cpu"), torch.bfloat16) is None
        varlen.why_not.cache_clear()
        own = torch.nn.attention.varlen.varlen_attn

        def top_left(*args, window_size, **others):
            # Windows that count otherwise.
            left, right = window_size
            return own(*args, window_size=(left + 1 if left >= 0 else left, right), **others)

        def broken(*_, **__):
            raise RuntimeError("no kernel\nmore")

        for other, said in ((top_left, "other numbers"), (broken, "fails (no kernel)")):
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.attention.varlen, "varlen_attn", other)
                varlen.why_not.cache_clear()
                assert said in varlen.why_not(torch.device("cpu"), torch.bfloat16)


def test_the_real_varlen_attn_takes_what_it_is_given():
    """Its schema and its shapes, by the fake kernel that torch keeps for tracing: no device is needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    texts = varlen.texts_of(TABLES, BEFORE, LENGTHS, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, pool = torch.empty(70, 4, 64, dtype=torch.bfloat16), torch.empty(6 * 256, 2, 64, dtype=torch.bfloat16)
        for window in (None, 9):
            assert varlen.attend_varlen(q, pool, pool, texts, Rules(True, 0.3, window)).shape == q.shape
