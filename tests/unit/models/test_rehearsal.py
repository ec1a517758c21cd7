"""A pass without numbers holds what the same pass holds with them."""

import pytest
import torch

from luthier.core.types import Encoded
from luthier.models.adapters import ADAPTERS
from luthier.models.checkpointing import checkpoint_layers
from luthier.models.fuse import fuse
from luthier.models.load import load_model
from luthier.models.output import head_of
from luthier.models.packed import packs, shares
from luthier.models.precision import cast_weights
from luthier.models.quantised.linear import _kept
from luthier.models.quantised.network import quantise_loaded
from luthier.models.rehearsal import META, Ledger, rehearse
from luthier.training.objectives import OBJECTIVES
from tiny import ALL_FAMILIES, kind_of, tiny_loaded, tiny_model

LENGTHS = (40, 7, 90, 23, 23, 64)


def rows_for(objective, parents=()):
    made = []
    for at, length in enumerate(LENGTHS):
        ids = tuple((at * 31 + place * 7) % 90 + 5 for place in range(length))
        if objective.kind == "seq2seq":
            made.append(Encoded(str(at), ids, target=ids[::2], target_weights=(1.0,) * len(ids[::2])))
        elif objective.kind == "classify":
            made.append(Encoded(str(at), ids, gold=at % 2))
        elif objective.kind == "dpo":
            prompt, each = 10, length // 2 + 5
            made.append(
                Encoded(
                    str(at),
                    tuple(range(5, 5 + prompt + 2 * each)),
                    (0.0,) * prompt + (1.0,) * 2 * each,
                    segments=(prompt, each, each),
                    parents=(-1, 0, 0),
                    gold=(-9.0, -8.0),
                )
            )
        else:
            made.append(Encoded(str(at), ids, (0.0,) + (1.0,) * (length - 1)))
    return made


def both(model, objective, rows):
    """Most bytes held by a pass forward and back, without numbers and with them; and the FLOPs of each."""
    if objective.kind != "classify":
        head_of(model)
    packs(model), shares(model)
    model.module.train()
    found = []
    for rehearsed in (True, False):
        model.module.zero_grad(set_to_none=True)
        ledger = Ledger()
        if rehearsed:
            with rehearse([model.module], torch.device("cpu")) as ledger:
                ledger.mark()
                loss, _ = objective.measure(model, objective.batch(rows, model, (0, 0)).to(META))
                loss.sum.backward()
        else:
            ledger.know([*model.module.parameters(), *model.module.buffers()])
            with ledger:
                loss, _ = objective.measure(model, objective.batch(rows, model, (0, 0)))
                loss.sum.backward()
        found.append((ledger.peak, sum(ledger.flops.values())))
        del loss
    return found


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("kind", ["natural", "classify"])
def test_every_family(family, kind):
    natural = {"decoder": "sft", "encoder": "pretrain", "encoder-decoder": "seq2seq"}[kind_of(family)]
    objective = OBJECTIVES.parse(natural if kind == "natural" else {"kind": "classify", "loss": "cross_entropy"})
    options = {"task": "classify", "labels": ("a", "b")} if kind == "classify" else {}
    model = load_model(str(tiny_model(family)), **options)
    weights = [one.clone() for one in model.module.parameters()]
    (peak, flops), (real, counted) = both(model, objective, rows_for(objective))
    # An encoder-decoder looks at the values of its masks: without them it keeps some that it would not need.
    assert peak == pytest.approx(real, rel=0.1 if kind_of(family) == "encoder-decoder" else 0.06)
    # Nor do its products, which the rehearsal knows of.
    assert flops >= counted > 0
    assert all(torch.equal(one, kept) and not one.is_meta for one, kept in zip(model.module.parameters(), weights))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["full", "freeze", {"kind": "lora", "rank": 4}, {"kind": "dora", "rank": 4}])
@pytest.mark.parametrize("way", ["plain", "fused", "layers", "dpo"])
def test_adapters_and_ways(precision, adapter, way):
    model = tiny_loaded("llama")
    ADAPTERS.parse(adapter).apply(model)
    cast_weights(model, precision)
    if way in ("fused", "layers"):
        assert packs(model) and fuse(model)
    if way == "layers":
        assert checkpoint_layers(model, "layers") == 2
    objective = OBJECTIVES.parse("dpo" if way == "dpo" else "sft")
    (peak, _), (real, _) = both(model, objective, rows_for(objective))
    assert peak == pytest.approx(real, rel=0.04)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_quantised_bases(form):
    model = tiny_loaded("llama")
    quantise_loaded(model, form)
    vars(_kept).clear()  # room that an earlier test left
    ADAPTERS.parse({"kind": "lora", "rank": 4}).apply(model)
    objective = OBJECTIVES.parse("sft")
    (peak, _), (real, _) = both(model, objective, rows_for(objective))
    assert peak == pytest.approx(real, rel=0.08)


def test_checkpointing_holds_less():
    objective = OBJECTIVES.parse("sft")
    peaks = []
    for how in ("none", "layers"):
        model = tiny_loaded("llama")
        ADAPTERS.parse({"kind": "lora", "rank": 4}).apply(model)
        checkpoint_layers(model, how)
        peaks.append(both(model, objective, rows_for(objective))[0][0])
    assert peaks[1] < 0.8 * peaks[0]


def test_what_is_let_go_is_struck_out():
    ledger = Ledger()
    with ledger:
        first = torch.empty(100)
        view = first[10:].view(-1)
        second = first + 1
        assert (ledger.held, ledger.peak) == (800, 800)
        del first
        assert ledger.held == 800  # the view keeps it
        del view
        assert (ledger.held, ledger.peak) == (400, 800)
        ledger.mark()
        del second
        torch.empty(10)
    assert (ledger.held, ledger.peak) == (0, 400)


def test_products_are_counted():
    ledger = Ledger()
    with ledger:
        torch.ones(3, 5) @ torch.ones(5, 7)
        torch.bmm(torch.ones(2, 3, 5, dtype=torch.bfloat16), torch.ones(2, 5, 7, dtype=torch.bfloat16))
        torch.nn.functional.linear(torch.ones(3, 5), torch.ones(7, 5), torch.ones(7))
    assert ledger.flops == {torch.float32: 2 * 2 * 3 * 5 * 7, torch.bfloat16: 2 * 2 * 3 * 5 * 7}
