"""NEFTune's noise: its size, where it goes, and that neither micro-batches nor layouts change it."""

import math
from dataclasses import replace

import pytest
import torch

from luthier.core.errors import TrainingError
from luthier.core.types import Encoded
from luthier.data.batches import collate
from luthier.models.packed import hidden_states
from luthier.training.noise import draw_noise, noisy_inputs
from luthier.training.objectives import OBJECTIVES
from tiny import FAMILIES, kind_of, tiny_loaded

SEED = (0, 7)


def rows(model, lengths=(5, 9, 4)):
    at, found = 10, []
    for row, length in enumerate(lengths):
        ids = tuple(range(at, at + length))
        at += length
        target = (11, 12, 13) if model.spec.kind == "encoder-decoder" else ()
        weights = () if target else (0.0,) + (1.0,) * (length - 1)
        found.append(Encoded(f"row {row}", ids, weights, target=target, target_weights=(1.0,) * len(target)))
    return found


def embedded(model, batch, alpha):
    """What the input embeddings gave while a loss of `batch` was computed, each call."""
    body = model.network.get_encoder() if model.spec.kind == "encoder-decoder" else model.network
    calls = []
    with noisy_inputs(model, batch, alpha, SEED):
        # Registered after the noise, so it sees what the model sees.
        hook = body.get_input_embeddings().register_forward_hook(lambda m, i, out: calls.append((i[0], out.detach())))
        OBJECTIVES.parse({"decoder": "sft", "encoder-decoder": "seq2seq"}[model.spec.kind]).measure(model, batch)
        hook.remove()
    return calls


def test_its_size_and_draw():
    ids = torch.arange(64)
    noise = draw_noise(ids, 48, 5.0, SEED)
    limit = 5 / math.sqrt(64 * 48)
    assert float(noise.abs().max()) <= limit and float(noise.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)
    assert float(noise.mean().abs()) < 0.05 * limit
    assert torch.equal(noise, draw_noise(ids.clone(), 48, 5.0, SEED))
    for other in (draw_noise(ids, 48, 5.0, (0, 8)), draw_noise(ids + 1, 48, 5.0, SEED)):
        assert not torch.equal(noise, other)
    # The expected length of the noise of a whole text is alpha / sqrt(3), however long it is (the paper's section 2).
    for length in (4, 400):
        assert float(draw_noise(torch.arange(length), 48, 5.0, SEED).norm()) == pytest.approx(5 / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("family", [*FAMILIES["decoder"], *FAMILIES["encoder-decoder"]])
def test_each_text_carries_its_own_noise(family):
    model = tiny_loaded(family)
    given = rows(model)
    batch = collate(given)
    embedded(model, batch, 0.0)  # tries packing and the head, once
    plain, noisy = embedded(model, batch, 0.0), embedded(model, batch, 5.0)
    assert len(plain) == len(noisy)
    changed = [not torch.equal(a, b) for (_, a), (_, b) in zip(plain, noisy)]
    # A decoder that shares the encoder's table looks up the target in it: without noise.
    assert sum(changed) == 1
    (ids, before), (_, after) = plain[changed.index(True)], noisy[changed.index(True)]
    added = (after - before).reshape(-1, after.shape[-1])[: ids.numel()]
    flat = ids.reshape(-1)
    for row in given:
        start = int((flat == row.ids[0]).nonzero()[0])
        wanted = draw_noise(torch.tensor(row.ids), after.shape[-1], 5.0, SEED)
        torch.testing.assert_close(added[start : start + len(row.ids)], wanted, rtol=1e-4, atol=1e-5)
    assert int((added.abs().sum(1) > 0).sum()) == sum(len(row.ids) for row in given)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "t5"])
def test_micro_batches_change_nothing(family):
    model = tiny_loaded(family)
    objective = OBJECTIVES.parse("seq2seq" if kind_of(family) == "encoder-decoder" else "sft")

    def total(parts, alpha):
        value = 0.0
        for part in parts:
            batch = collate(part)
            with noisy_inputs(model, batch, alpha, SEED):
                value += float(objective.measure(model, batch)[0].sum.detach())
        return value

    whole = rows(model)
    together = total([whole], 50.0)
    assert together == pytest.approx(total([whole[2:], whole[:1], whole[1:2]], 50.0), rel=1e-5)
    assert together != pytest.approx(total([whole], 0.0), rel=1e-3)


def test_a_shared_prompt_carries_the_same_noise_in_each_text():
    model = tiny_loaded("llama")
    prompt, ends = (20, 21, 22, 23), ((30, 31), (40, 41, 42))
    flat = (*prompt, *ends[0], *ends[1])
    row = Encoded("row", flat, (1.0,) * len(flat), segments=(4, 2, 3), parents=(-1, 0, 0))
    batch = collate([replace(row)])
    with noisy_inputs(model, batch, 50.0, SEED):
        states = hidden_states(model, batch.ids_N, batch.lengths, batch.parents)
    # Each text alone, its noise put in by hand.
    table = model.network.get_input_embeddings()
    for start, end in ((4, ends[0]), (6, ends[1])):
        ids = torch.tensor((*prompt, *end))
        noise = torch.cat([draw_noise(part, 32, 50.0, SEED) for part in (ids[:4], ids[4:])])
        alone = model.network.base_model(inputs_embeds=(table(ids) + noise)[None]).last_hidden_state[0]
        torch.testing.assert_close(states[start : start + len(end)], alone[4:], rtol=1e-4, atol=1e-5)


def test_none_where_no_gradient_is_wanted_and_none_left_behind():
    model = tiny_loaded("llama")
    batch = collate(rows(model))
    with torch.no_grad():
        plain = hidden_states(model, batch.ids_N, batch.lengths)
    with noisy_inputs(model, batch, 50.0, SEED):
        with torch.no_grad():
            assert torch.equal(hidden_states(model, batch.ids_N, batch.lengths), plain)
        assert not torch.equal(hidden_states(model, batch.ids_N, batch.lengths), plain)
    assert torch.equal(hidden_states(model, batch.ids_N, batch.lengths), plain)


def test_noise_that_reaches_nothing_is_an_error():
    model = tiny_loaded("llama")
    with pytest.raises(TrainingError, match="no noise was added"), noisy_inputs(model, collate(rows(model)), 5.0, SEED):
        pass
