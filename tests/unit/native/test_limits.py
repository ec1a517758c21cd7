"""The native decoder where numbers are not finite, ids are not the model's, and threads share it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from luthier.native.cached import Cached
from luthier.native.forms import to_int4
from luthier.native.library import why_no_decoder
from luthier.native.packed import Packed
from luthier.native.shape import ACTIVATIONS, Block, Decoder, Linear, Norm

pytestmark = pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))

WIDTH, INNER, TOKENS = 32, 64, 40
IDS = [(7 * at) % TOKENS for at in range(50)]
BROKEN = 3


def linear(outputs, inputs, seed, bias_N=None):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * inputs**-0.5
    return Linear(lambda: weight, bias_N)


def small_decoder(activation="silu", up_bias=None, qkv_bias=None, embedding_VE=None, head=None, places_PE=None):
    norm = Norm("rms", 1e-5, torch.ones(WIDTH))
    blocks = tuple(
        Block(
            qkv=linear(3 * WIDTH, WIDTH, 4 * at + 1, qkv_bias), out=linear(WIDTH, WIDTH, 4 * at + 2),
            up=linear(INNER, WIDTH, 4 * at + 3, up_bias), down=linear(WIDTH, INNER, 4 * at + 4),
            before_attention=norm, before_mlp=norm,
        )
        for at in range(2)
    )  # fmt: skip
    if embedding_VE is None:
        embedding_VE = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return Decoder(
        blocks=blocks, heads=2, kv=2, size=16, scale=0.25, activation=activation, gated=False, embedding_VE=embedding_VE,
        last=norm, head=head or linear(TOKENS, WIDTH, 9), places_PE=places_PE,
    )  # fmt: skip


# Of weights, and of keys and values.
FORMS = [("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("int8", "int8"), ("int8", "bfloat16"), ("int4", "bfloat16")]


def packed_in(form, kept, decoder):
    packed = Packed(decoder, form)
    packed.kept = kept
    return packed


def logits(packed, ids, table=(0, 1), cached=None):
    return (cached or Cached(packed, 2)).read(ids, [list(table)], [0], [len(ids)], list(range(len(ids))))


@pytest.mark.parametrize(("form", "kept"), FORMS)
def test_a_text_does_not_suffer_from_what_its_blocks_held_before(form, kept):
    embedding_VE = torch.randn(TOKENS, WIDTH)
    embedding_VE[BROKEN] = torch.inf
    packed = packed_in(form, kept, small_decoder(embedding_VE=embedding_VE))
    cached, ids = Cached(packed, 2), [one for one in IDS if one != BROKEN][:7]
    assert logits(packed, [BROKEN] * 64, cached=cached).isnan().all()
    found = logits(packed, ids, cached=cached)
    assert found.isfinite().all() and torch.equal(found, logits(packed, ids))


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_number_that_is_none_stays_visible(activation, form):
    bias_N = torch.zeros(INNER)
    bias_N[BROKEN] = torch.nan
    assert logits(Packed(small_decoder(activation, up_bias=bias_N), form), IDS).isnan().all()


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_a_text_whose_largest_logit_is_no_number_has_no_likeliest_token_and_those_beside_it_have(form):
    embedding_VE = torch.randn(TOKENS, WIDTH)
    embedding_VE[BROKEN] = torch.nan
    packed = Packed(small_decoder(embedding_VE=embedding_VE), form)
    texts = [[5, 6], [5, BROKEN], [7, 8]]
    found, alone = (
        Cached(packed, 3).read([one for text in some for one in text], [[at] for at in range(len(some))], [0] * len(some),
                               [2] * len(some), range(1, 2 * len(some), 2), likeliest=True).tolist()
        for some in (texts, texts[::2])
    )  # fmt: skip
    assert found == [alone[0], -1, alone[1]] and min(alone) >= 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 17, TOKENS - 1])
def test_one_logit_above_all_numbers_is_enough(at, bad):
    bias_N = torch.zeros(TOKENS)
    bias_N[at] = bad
    packed = Packed(small_decoder(head=linear(TOKENS, WIDTH, 9, bias_N)), "bfloat16")
    assert Cached(packed, 1).read([5, 6], [[0]], [0], [2], [0, 1], likeliest=True).tolist() == [-1, -1]
    bias_N[at] = -torch.inf
    packed = Packed(small_decoder(head=linear(TOKENS, WIDTH, 9, bias_N)), "bfloat16")
    assert min(Cached(packed, 1).read([5, 6], [[0]], [0], [2], [0, 1], likeliest=True).tolist()) >= 0


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_scores_that_are_no_numbers_stay_visible(kept):
    bias_N = torch.zeros(3 * WIDTH)
    bias_N[[WIDTH, WIDTH + 16]] = torch.inf
    assert logits(packed_in("bfloat16", kept, small_decoder(qkv_bias=bias_N)), IDS).isnan().all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("at", [0, WIDTH, 2 * WIDTH], ids=["query", "key", "value"])
@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_a_query_key_or_value_that_is_no_number_stays_visible(kept, at, bad):
    bias_N = torch.zeros(3 * WIDTH)
    bias_N[at + 3] = bad
    assert not logits(packed_in("bfloat16", kept, small_decoder(qkv_bias=bias_N)), IDS).isfinite().any()


def test_weights_that_are_no_numbers_are_none_in_int4():
    weight_NK = torch.randn(16, 128)
    weight_NK[2, 5], weight_NK[3, 70] = torch.nan, torch.inf
    _, scale_NG = to_int4(weight_NK)
    assert scale_NG.isfinite().logical_not().nonzero().tolist() == [[2, 0], [3, 1]]


@pytest.mark.parametrize("ids", [[5, TOKENS], [-1, 5]])
def test_ids_that_are_no_tokens_of_the_model_are_refused(ids):
    with pytest.raises(IndexError, match=r"tokens from (5 to 40|-1 to 5), and the model has 40"):
        logits(Packed(small_decoder(), "bfloat16"), ids)


def test_places_beyond_those_that_were_learned_are_refused():
    packed = Packed(small_decoder(places_PE=torch.randn(49, WIDTH)), "bfloat16")
    assert logits(packed, IDS[:49]).isfinite().all()
    with pytest.raises(IndexError, match="50 places, and the model has 49"):
        logits(packed, IDS)


def test_a_table_too_short_for_its_text_is_refused():
    with pytest.raises(IndexError, match="blocks"):
        logits(Packed(small_decoder(), "bfloat16"), IDS, table=[1])
    with pytest.raises(IndexError, match="blocks"):
        logits(Packed(small_decoder(), "bfloat16"), IDS, table=[0, 2])


def test_a_head_may_tell_fewer_tokens_than_are_read():
    head = linear(TOKENS - 11, WIDTH, 9)
    packed = Packed(small_decoder(head=head), "bfloat16")
    found = logits(packed, IDS)
    assert found.shape == (len(IDS), TOKENS - 11) and found.isfinite().all()


def test_threads_that_read_by_the_same_weights_do_not_disturb_one_another():
    packed = Packed(small_decoder(), "bfloat16")
    texts = [[(at * one) % TOKENS for at in range(300)] for one in (1, 3, 7, 9)]

    def read(text):
        cached = Cached(packed, 10)
        return [
            cached.read(text[at : at + 30], [list(range(10))], [at], [30], list(range(30))) for at in range(0, 300, 30)
        ]

    right = [torch.cat(read(text)) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for found, one in zip(pool.map(read, texts), right):
                assert torch.equal(torch.cat(found), one)
