"""The native decoder: what it reads off families, its logits beside plain torch's, and its independence of what is beside."""

import random

import pytest
import torch

from decoders import FAMILIES, decoder_model
from luthier.models.adapters import ADAPTERS
from luthier.models.decoder import describe
from luthier.models.output import head_of
from luthier.models.packed import hidden_states
from luthier.models.rules import Unlike
from luthier.native.cached import Cached
from luthier.native.forms import filled, rounded, to_int4, to_int8
from luthier.native.library import TOKENS, why_no_decoder
from luthier.native.packed import Packed
from luthier.native.plain import read_plainly

pytestmark = pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))


def some_ids(count, seed=0):
    draw = random.Random(seed)
    return [draw.randrange(5, 390) for _ in range(count)]


@torch.inference_mode()
def own_logits(model, ids):
    return head_of(model).logits(hidden_states(model, torch.tensor(ids), (len(ids),))).float()


def native_logits(packed, ids):
    blocks = -(-len(ids) // TOKENS)
    order = list(range(blocks))
    random.Random(1).shuffle(order)
    return Cached(packed, blocks).read(ids, [order], [0], [len(ids)], list(range(len(ids))))


def apart(one, other):
    one, other = (each - each.mean(-1, keepdim=True) for each in (one, other))
    return float((one - other).norm() / other.norm())


def adapted(family, rank, seed):
    """A model with an adapter that does something."""
    model = decoder_model(family)
    ADAPTERS.parse({"kind": "lora", "rank": rank, "alpha": 2 * rank}).apply(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "lora_b" in name:
                weight.normal_(std=0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_off_a_family_is_what_it_computes(family):
    model, ids = decoder_model(family), some_ids(100)
    decoder, own_TV = describe(model), own_logits(model, ids)
    assert apart(read_plainly(decoder, torch.tensor(ids)), own_TV) < 1e-5
    assert apart(native_logits(Packed(decoder, "bfloat16"), ids), own_TV) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_that_the_module_gives(family):
    model, ids = decoder_model(family), some_ids(100)
    with torch.inference_mode():
        own_NE = hidden_states(model, torch.tensor(ids), (60, 40)).float()
    cached, blocks = Cached(Packed(describe(model), "bfloat16"), 4), [[2, 0], [3, 1]]
    found_NE = cached.read(ids, blocks, [0, 0], [60, 40], range(100), states=True)
    assert float((found_NE - own_NE).norm() / own_NE.norm()) < 0.02


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_the_c_code_follows_the_plain_one_with_the_same_rounded_weights(family, form):
    decoder, ids = describe(decoder_model(family)), some_ids(100)
    plain_TV = read_plainly(decoder, torch.tensor(ids), form, "int8" if form == "int4" else None)
    assert apart(native_logits(Packed(decoder, form), ids), plain_TV) < (0.02 if form == "bfloat16" else 0.05)


@pytest.mark.parametrize(
    ("form", "kept"),
    [("bfloat16", "bfloat16"), ("int8", "bfloat16"), ("int8", "int8"), ("int4", "bfloat16"), ("int4", "int8")],
)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mistral"])
def test_a_token_is_the_same_bits_whatever_is_beside_it(family, form, kept):
    packed = Packed(describe(decoder_model(family)), form)
    packed.kept = kept
    texts = [some_ids(size, size) for size in (1, 5, 33, 64, 90, 2, 17, 40)]
    tables, taken = [], list(range(200))
    random.Random(3).shuffle(taken)
    for text in texts:
        tables.append([taken.pop() for _ in range(-(-len(text) // TOKENS))])
    together = Cached(packed, 200)
    ends = torch.tensor([len(text) for text in texts]).cumsum(0) - 1
    whole = together.read(
        [one for text in texts for one in text], tables, [0] * 8, [len(one) for one in texts], ends.tolist()
    )
    best = together.read(
        [one for text in texts for one in text],
        tables,
        [0] * 8,
        [len(one) for one in texts],
        ends.tolist(),
        likeliest=True,
    )
    assert best.tolist() == whole.argmax(-1).tolist()
    for text, table, row in zip(texts, tables, whole):
        alone = Cached(packed, 200)
        for at, token in enumerate(text):
            found = alone.read([token], [table], [at], [1], [0])
        assert torch.equal(found[0], row)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_any_number_of_rows_gives_each_the_same_bits(form):
    # As many rows at once as there are registers for, what is left of them, and few go different ways.
    packed, ids = Packed(describe(decoder_model("qwen2")), form), some_ids(36)
    alone = torch.cat([Cached(packed, 1).read([one], [[0]], [0], [1], [0]) for one in ids])
    for count in range(1, 37):
        places, cached = list(range(count)), Cached(packed, count)
        step = ids[:count], [[at] for at in places], [0] * count, [1] * count, places
        assert torch.equal(cached.read(*step), alone[:count])
        assert cached.read(*step, likeliest=True).tolist() == alone[:count].argmax(-1).tolist()


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "phi", "gemma2"])
def test_what_is_not_wanted_ends_early_and_changes_nothing(family, form):
    # In the last layer such tokens leave their keys and values, which later steps read.
    packed = Packed(describe(decoder_model(family)), form)
    packed.take_adapters([describe(adapted(family, 4, 1), apart=True)])
    ids, tables, lengths, adapters = some_ids(130), [[4, 1, 0], [2, 3]], [90, 40], [0, -1]
    every = Cached(packed, 5).read(ids, tables, [0, 0], lengths, range(130), adapters=adapters)
    for rows in ([89, 129], [3, 4, 5, 6, 100], [129], [100, 3, 3], []):
        cached = Cached(packed, 5)
        assert torch.equal(cached.read(ids, tables, [0, 0], lengths, rows, adapters=adapters), every[rows])
        later = cached.read(ids[:2], tables, lengths, [1, 1], [0, 1], adapters=adapters)
        whole = Cached(packed, 5)
        whole.read(ids, tables, [0, 0], lengths, range(130), adapters=adapters)
        assert torch.equal(later, whole.read(ids[:2], tables, lengths, [1, 1], [0, 1], adapters=adapters))


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "phi3"])
def test_adapters_kept_apart_add_what_they_add_each_to_its_own_texts(family, form):
    model, ids = decoder_model(family), some_ids(70)
    bare = describe(model)
    decoders, wholes = [], []
    for rank, seed in ((4, 1), (20, 2)):
        other = adapted(family, rank, seed)
        decoders.append(describe(other, apart=True))
        wholes.append(describe(other))
        assert apart(read_plainly(decoders[-1], torch.tensor(ids)), own_logits(other, ids)) < 1e-5
    packed = Packed(bare, form)
    packed.take_adapters(decoders)
    tables = [[0, 1, 2], [5, 4, 3], [6, 7, 8]]
    rows = list(range(3 * len(ids)))
    found = Cached(packed, 9).read(ids * 3, tables, [0] * 3, [len(ids)] * 3, rows, adapters=[1, -1, 0]).split(len(ids))
    limit = 0.02 if form == "bfloat16" else 0.05
    for logits, right in zip(found, (wholes[1], bare, wholes[0])):
        plain = read_plainly(right, torch.tensor(ids))
        assert apart(logits, plain) < limit
    assert apart(found[0], found[1]) > 3 * limit
    alone = Cached(packed, 9).read(ids, [[2, 1, 0]], [0], [len(ids)], list(range(len(ids))), adapters=[1])
    assert torch.equal(alone, found[0])


def test_weights_in_whole_numbers_are_as_near_as_their_scales_allow():
    weight_NK = torch.randn(40, 200)
    numbers, scale_N = to_int8(weight_NK)
    assert float((numbers.float() * scale_N[:, None] - weight_NK).abs().max()) <= float(scale_N.max()) / 2 + 1e-6
    whole_NK = filled(weight_NK, "int4")
    assert whole_NK.shape == (48, 256)
    numbers, _ = to_int4(whole_NK)
    assert int(numbers.min()) >= 0 and int(numbers.max()) <= 15
    assert float((rounded(weight_NK, "int4") - weight_NK).norm() / weight_NK.norm()) < 0.1


@pytest.mark.parametrize("family", ["cohere", "gpt_neox", "olmo2", "bloom"])
def test_a_family_that_computes_otherwise_is_refused_with_the_reason(family):
    with pytest.raises(Unlike, match=r"has|makes|does|gives|pairs"):
        describe(decoder_model(family, head_dim=...))
