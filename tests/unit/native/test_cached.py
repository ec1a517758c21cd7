"""Keys and values in bytes: rounded as plain torch rounds them, half as large, copied whole, and as they were in each step."""

import pytest
import torch

from luthier.native.cached import Cached
from luthier.native.library import TOKENS, why_no_decoder
from luthier.native.packed import Packed
from luthier.native.plain import read_plainly
from luthier.native.shape import Block, Decoder, Linear, Norm

pytestmark = pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))

VOCABULARY, COUNT = 64, 150


def linear(weight_NK):
    return Linear(lambda: weight_NK)


def bare_decoder(heads, kv, size, window=None, softcap=None):
    """Attention alone: queries, keys and values are what is in the embedding, in bf16 exactly, and what it gives is read off."""
    made, mixed = (heads + 2 * kv) * size, heads * size
    width = made + mixed
    noise = torch.Generator().manual_seed(size + heads)
    embedding_VE = torch.zeros(VOCABULARY, width)
    # One number of each head far above the others, so that rounding to bytes is rough.
    embedding_VE[:, :made] = torch.randn(VOCABULARY, made, generator=noise) * (
        1 + 30 * (torch.arange(made) % size == 3)
    )
    out_EM = torch.zeros(width, mixed)
    out_EM[made:] = torch.eye(mixed)
    block = Block(
        qkv=linear(torch.eye(made, width)), out=linear(out_EM), up=linear(torch.zeros(16, width)),
        down=linear(torch.zeros(width, 16)), window=window,
    )  # fmt: skip
    head_NE = torch.zeros(mixed, width)
    head_NE[:, made:] = torch.eye(mixed)
    return Decoder(
        blocks=(block,), heads=heads, kv=kv, size=size, scale=0.02 * size**-0.5, activation="relu", gated=False,
        embedding_VE=embedding_VE.bfloat16(), last=Norm("rms", 1e-5, torch.ones(width)), head=linear(head_NE), softcap=softcap,
    )  # fmt: skip


def packed_in(kept, decoder):
    packed = Packed(decoder, "bfloat16")
    packed.kept = kept
    return packed


def some_ids():
    return torch.randint(VOCABULARY, (COUNT,), generator=torch.Generator().manual_seed(1)).tolist()


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("pieces", [[COUNT], [1] * COUNT, [40, 70, 40]], ids=["whole", "ones", "pieces"])
@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 9, "kv": 3, "size": 64}, {"heads": 14, "kv": 2, "size": 64, "window": 40}, {"heads": 2, "kv": 2, "size": 80},
        {"heads": 6, "kv": 1, "size": 128, "softcap": 2.0}, {"heads": 2, "kv": 1, "size": 256, "window": 33, "softcap": 5.0},
        {"heads": 16, "kv": 1, "size": 96},
    ],
)  # fmt: skip
def test_bytes_are_rounded_as_plain_torch_rounds_them(settings, pieces):
    decoder, ids, blocks = bare_decoder(**settings), some_ids(), [4, 1, 0, 3, 2]
    cached, start, found = Cached(packed_in("int8", decoder), len(blocks)), 0, []
    for count in pieces:
        found.append(cached.read(ids[start : start + count], [blocks], [start], [count], list(range(count))))
        start += count
    rounded, whole = (read_plainly(decoder, torch.tensor(ids), kept=kept) for kept in ("int8", None))
    assert apart(torch.cat(found), rounded) < 0.005
    assert apart(rounded, whole) > 0.015


def test_bytes_take_half_and_their_scales():
    decoder = bare_decoder(9, 3, 64)
    assert packed_in("bfloat16", decoder).kept_bytes == 2 * 2 * 3 * 64
    assert packed_in("int8", decoder).kept_bytes == 2 * 3 * (64 + 4)
    assert [Packed(decoder, form).kept for form in ("bfloat16", "int8", "int4")] == ["bfloat16", "int8", "int8"]


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_a_block_is_copied_with_all_that_belongs_to_it(kept):
    packed, ids = packed_in(kept, bare_decoder(4, 2, 64)), some_ids()[: 2 * TOKENS]
    cached = Cached(packed, 6)
    cached.read(ids[:40], [[3, 5]], [0], [40], [])
    # What stood there before must not matter.
    cached.read(ids[::-1], [[1, 0]], [0], [len(ids)], [])
    cached.copy(5, 1)
    found = cached.read(ids[40:] * 2, [[3, 1], [3, 5]], [40, 40], [24, 24], list(range(48)))
    assert torch.equal(found[:24], found[24:])


def test_readers_of_both_forms_take_turns_over_one_packed_decoder():
    packed, ids = packed_in("int8", bare_decoder(4, 2, 64)), some_ids()
    other = packed_in("bfloat16", packed.decoder)
    right = [Cached(one, 5).read(ids, [[0, 1, 2, 3, 4]], [0], [COUNT], [COUNT - 1]) for one in (packed, other)]
    readers = [Cached(packed, 5)]
    packed.kept = "bfloat16"
    readers.append(Cached(packed, 5))
    for start in range(0, COUNT, 50):
        for at, reader in enumerate(readers):
            found = reader.read(ids[start : start + 50], [[0, 1, 2, 3, 4]], [start], [50], [49])
            if start + 50 == COUNT:
                assert torch.equal(found, right[at])
    assert not torch.equal(*right)
