"""The native decoder over decoders, texts and steps drawn at random: beside plain torch, and beside itself."""

import random
from dataclasses import replace

import pytest
import torch

from luthier.native.cached import Cached
from luthier.native.library import TOKENS, why_no_decoder
from luthier.native.packed import Packed
from luthier.native.plain import read_plainly
from luthier.native.shape import ACTIVATIONS, Block, Decoder, Linear, Norm, Turns

pytestmark = pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))

# Heads of queries for one of keys, and widths of a head.
GROUPS, SIZES = (1, 2, 3, 4, 5, 7, 8, 12, 16), (16, 32, 48, 64, 80, 96, 112, 128, 256)
FORMS = ("bfloat16", "int8", "int4")


def drawn_decoder(draw, group, size):
    """A decoder of two layers whose every other number is drawn."""
    noise = torch.Generator().manual_seed(draw.randrange(10**6))
    kv = draw.choice((1, 2, 3)) if size * group < 512 else 1
    width, inner = 16 * draw.randrange(1, 13), 16 * draw.randrange(1, 20)
    gated, turned = draw.random() < 0.6, draw.choice((size, size // 2, size // 4))
    parallel, places = draw.random() < 0.2, draw.random() < 0.3
    vocabulary = draw.randrange(20, 90)

    def linear(outputs, inputs):
        weight = torch.randn(outputs, inputs, generator=noise) * inputs**-0.5
        return Linear(lambda: weight, torch.randn(outputs, generator=noise) * 0.1 if draw.random() < 0.4 else None)

    def norm(wide, chance=1.0):
        if draw.random() > chance:
            return None
        weight = 1 + 0.1 * torch.randn(wide, generator=noise)
        if draw.random() < 0.6:
            return Norm("rms", 1e-5, weight)
        return Norm("layer", 1e-5, weight, torch.randn(wide, generator=noise) * 0.1 if draw.random() < 0.7 else None)

    def tables(count):
        speed = 500.0 ** -(torch.arange(turned // 2) / (turned // 2))
        return (torch.arange(count)[:, None] * speed).cos(), (torch.arange(count)[:, None] * speed).sin()

    turns = None if places else Turns(tables)
    blocks = tuple(
        Block(
            qkv=linear((group + 2) * kv * size, width), out=linear(width, group * kv * size),
            up=linear(inner * (1 + gated), width), down=linear(width, inner),
            before_attention=norm(width, 0.8), query=norm(size, 0.4), key=norm(size, 0.4),
            after_attention=norm(width, 0.3), before_mlp=norm(width, 0.8), after_mlp=norm(width, 0.3), turns=turns,
            window=draw.choice((None, 1, 5, 31, 32, 33, 70)),
        )
        for _ in range(2)
    )  # fmt: skip
    return Decoder(
        blocks=blocks, heads=group * kv, kv=kv, size=size, scale=size**-0.5, activation=draw.choice(ACTIVATIONS), gated=gated,
        embedding_VE=torch.randn(vocabulary, width, generator=noise), last=norm(width), head=linear(vocabulary, width),
        softcap=draw.choice((None, 5.0)), parallel=parallel, residual=draw.choice((1.0, 0.5)),
        embedding_scale=draw.choice((1.0, 3.0)),
        places_PE=torch.randn(200, width, generator=noise) * 0.1 if places else None,
        head_scale=draw.choice((1.0, 0.5)), head_softcap=draw.choice((None, 4.0)),
    )  # fmt: skip


def drawn_texts(draw, decoder):
    vocabulary = len(decoder.embedding_VE)
    sizes = [draw.choice((1, 2, 15, 31, 32, 33, 64, 65, 100)) for _ in range(draw.randrange(1, 6))]
    return [[draw.randrange(vocabulary) for _ in range(size)] for size in sizes]


def read_in_pieces(draw, packed, texts, threads):
    """The logits after each token of each text, read some tokens of some texts at a time, from blocks that lie anywhere."""
    free = list(range(40))
    draw.shuffle(free)
    cached = Cached(packed, 40)
    tables = [[free.pop() for _ in range(-(-len(text) // TOKENS))] for text in texts]
    read, found = [0] * len(texts), [[] for _ in texts]
    torch.set_num_threads(threads)
    while any(one < len(text) for one, text in zip(read, texts)):
        left = [at for at, text in enumerate(texts) if read[at] < len(text)]
        some = draw.sample(left, draw.randrange(1, len(left) + 1))
        counts = [draw.randrange(1, min(len(texts[at]) - read[at], 50) + 1) for at in some]
        ids = [one for at, count in zip(some, counts) for one in texts[at][read[at] : read[at] + count]]
        # Only the blocks that the tokens so far need.
        held = [tables[at][: -(-(read[at] + count) // TOKENS)] for at, count in zip(some, counts)]
        made = cached.read(ids, held, [read[at] for at in some], counts, list(range(len(ids))))
        for at, count, part in zip(some, counts, made.split(counts)):
            read[at] += count
            found[at].append(part)
    return [torch.cat(parts) for parts in found]


def apart(one, other):
    one, other = (each - each.mean(-1, keepdim=True) for each in (one, other))
    return float((one - other).norm() / other.norm())


@pytest.fixture
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(36))
def test_any_shape_in_any_pieces_is_what_plain_torch_says(seed, own_threads):
    draw = random.Random(seed)
    decoder = drawn_decoder(draw, GROUPS[seed % len(GROUPS)], SIZES[(seed // 2) % len(SIZES)])
    form, texts = FORMS[seed % 3], drawn_texts(draw, decoder)
    packed = Packed(decoder, form)
    packed.kept = ("bfloat16", "int8")[seed // 3 % 2]
    right = read_in_pieces(draw, packed, texts, 1)
    for text, found in zip(texts, right):
        plain = read_plainly(decoder, torch.tensor(text), form, "int8" if form == "int4" else None, packed.kept)
        assert apart(found, plain) < (0.03 if form == "bfloat16" else 0.08)
    for threads in (1, 2, 3):
        for one, other in zip(read_in_pieces(draw, packed, texts, threads), right):
            assert torch.equal(one, other)


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_long_text_is_what_plain_torch_says(form, own_threads):
    draw = random.Random(5)
    decoder = replace(drawn_decoder(draw, 4, 32), places_PE=None)
    windows = [replace(block, window=window) for block, window in zip(decoder.blocks, (None, 700))]
    decoder = replace(decoder, blocks=tuple(windows))
    text = [draw.randrange(len(decoder.embedding_VE)) for _ in range(2000)]
    table = draw.sample(range(70), 63)
    torch.set_num_threads(2)
    packed = Packed(decoder, form)
    cached, found = Cached(packed, 70), []
    for start in range(0, len(text), 512):
        ids = text[start : start + 512]
        found.append(cached.read(ids, [table], [start], [len(ids)], list(range(len(ids)))))
    assert apart(torch.cat(found), read_plainly(decoder, torch.tensor(text), form, kept=packed.kept)) < (
        0.03 if form == "bfloat16" else 0.08
    )
