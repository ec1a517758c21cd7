"""Packed equals separate: texts laid end to end are read as if each were alone, in every family that lets us."""

import pytest
import torch

from luthier.core.events import Events
from luthier.models.attention import Rules, _attend_plainly, attend_flat
from luthier.models.load import load_model
from luthier.models.output import head_of
from luthier.models.packed import hidden_states, packs
from luthier.models.segments import SHORT, Segments
from tiny import ALL_FAMILIES, tiny_loaded, tiny_model

LENGTHS = [(1,), (5, 5, 5), (3, 5, 4, 5), (40, 41, 39, 3, SHORT + 80), (SHORT + 80, SHORT + 180)]
CONTINUED = [
    ((5, 3, 4), (-1, 0, 0)),
    ((6, 7, *[3] * 6, 9), (-1, -1, *[1, 0] * 3, -1)),
    ((1, 9, 1, 1, 12, 30, 8, 3, 2), (-1, -1, 0, 1, 1, -1, 5, -1, 5)),
    ((SHORT + 80, 3, 40, 20, 70), (-1, 0, 0, -1, 3)),
    ((30, SHORT + 80, 4, SHORT + 10), (-1, 0, 0, -1)),
    ((SHORT + 20, SHORT + 80, 300), (-1, 0, 0)),
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4, 64])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_groups_and_fused_kernel_equal_plain_operations(lengths, causal, window, heads, dtype):
    torch.manual_seed(0)
    made = [torch.randn(sum(lengths), h, 16, dtype=dtype, requires_grad=True) for h in (heads[0], *heads[1:] * 2)]
    segments, rules = Segments(lengths), Rules(causal, 0.25, window)
    ours, plain = attend_flat(*made, segments, rules), _attend_plainly(*made, segments, rules)
    near = {"rtol": 1e-7, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours, plain, **near)
    grad = torch.randn_like(ours)
    for mine, theirs in zip(torch.autograd.grad(ours, made, grad), torch.autograd.grad(plain, made, grad)):
        torch.testing.assert_close(mine, theirs, **near)


@pytest.mark.parametrize(("lengths", "parents"), CONTINUED)
@pytest.mark.parametrize("window", [None, 4, 64])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_continuations_in_groups_and_alone_equal_plain_operations(lengths, parents, window, heads, dtype):
    torch.manual_seed(0)
    made = [torch.randn(sum(lengths), h, 16, dtype=dtype, requires_grad=True) for h in (heads[0], *heads[1:] * 2)]
    segments, rules = Segments(lengths, parents=parents), Rules(True, 0.25, window)
    ours, plain = attend_flat(*made, segments, rules), _attend_plainly(*made, segments, rules)
    near = {"rtol": 1e-7, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours, plain, **near)
    grad = torch.randn_like(ours)
    for mine, theirs in zip(torch.autograd.grad(ours, made, grad), torch.autograd.grad(plain, made, grad)):
        torch.testing.assert_close(mine, theirs, **near)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 4])
def test_a_continuation_attends_as_the_end_of_the_whole(softcap, window):
    """By the plain operations on parent and child as one segment, whose gradients add up over the children."""
    torch.manual_seed(0)
    lengths, parents = (5, 3, 1, 4, 6), (-1, 0, 0, -1, 3)
    made = [torch.randn(sum(lengths), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    rules = Rules(True, 0.3, window, softcap, torch.tensor([0.5, -1.0]) if softcap else None)
    ours = attend_flat(*made, Segments(lengths, parents=parents), rules)
    expected = []
    for at, up in enumerate(parents):
        whole = [torch.cat([x.split(lengths)[part] for part in (up, at) if part >= 0]) for x in made]
        expected.append(_attend_plainly(*whole, Segments([len(whole[0])]), rules)[-lengths[at] :])
    torch.testing.assert_close(ours, torch.cat(expected))
    grad = torch.randn_like(ours)
    theirs = torch.autograd.grad(torch.cat(expected), made, grad)
    for mine, other in zip(torch.autograd.grad(ours, made, grad), theirs):
        torch.testing.assert_close(mine, other)


def test_the_gradient_of_a_shared_parent_is_summed_in_fp32():
    """Added one by one in bf16, halves would be lost from 128 on."""
    children = 400
    lengths, parents = [1] * (children + 1), (-1, *[0] * children)
    made = [torch.zeros(children + 1, 1, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    attend_flat(*made, Segments(lengths, parents=parents), Rules(True, 1.0)).sum().backward()
    # The parent gives itself all of its attention, and every child gives the parent half of its own.
    assert made[2].grad[0].float().unique().tolist() == [1 + children / 2]


def test_plain_operations_keep_segments_apart_and_honour_caps_and_sinks():
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 2, 8) for _ in range(3))
    rules = Rules(True, 0.3, 3, softcap=2.0, sinks=torch.tensor([0.5, -1.0]))
    found = attend_flat(q, k, v, Segments((4, 5)), rules)
    for head in range(2):
        for at in range(9):
            start = 0 if at < 4 else 4
            seen = range(max(start, at - 2), at + 1)
            scores = [2.0 * torch.tanh(0.3 * q[at, head] @ k[other, head] / 2.0) for other in seen]
            shares = torch.stack([*scores, rules.sinks[head]]).softmax(0)[:-1]
            expected = sum(share * v[other, head] for share, other in zip(shares, seen))
            torch.testing.assert_close(found[at, head], expected)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("task", [None, "classify"])
def test_packed_equals_separate(family, task):
    model = load_model(str(tiny_model(family)), task=task, labels=("a", "b") if task else ())
    events = Events()
    packed = packs(model, events)
    unable = {"gpt_neo", "deberta-v2", "t5", "bart", "marian"}
    assert packed == (family not in unable)
    assert ("packing" in events.choices) == (family in {"gpt_neo", "deberta-v2"})
    ids, lengths = torch.arange(8, 68) % 50 + 8, (8, 1, 20, 31)
    with torch.no_grad():
        together = hidden_states(model, ids, lengths)
        alone = torch.cat([hidden_states(model, part, (len(part),)) for part in ids.split(lengths)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_model_in_double_precision_is_read_too():
    model = tiny_loaded("llama")
    model.module.double()
    assert packs(model)
    assert head_of(model).logits(hidden_states(model, torch.arange(8, 20), (12,))).dtype == torch.float64
