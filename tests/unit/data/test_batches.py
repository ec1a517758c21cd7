"""From encoded rows to tensors: positions decide, never the pad id; every row once an epoch."""

import pytest
import torch

from luthier.core.types import Encoded
from luthier.data.batches import collate, fill_batches, plan_steps, split_step


def test_rows_lie_end_to_end_with_their_weights():
    rows = [Encoded("a", (0, 0, 5), (0.0, 1.0, 1.0)), Encoded("b", (7,), (0.0,), weight=2.0)]
    batch = collate(rows)
    assert batch.ids_N.tolist() == [0, 0, 5, 7] and batch.lengths == (3, 1)
    assert batch.weights_N.tolist() == [0, 1, 1, 0]
    assert batch.weight == 2.0 and batch.tokens == 4


def test_documents_in_a_row_stay_apart():
    packed = Encoded("a", (1, 2, 3, 4, 5), (0.0, 1.0, 0.0, 1.0, 1.0), segments=(2, 3))
    assert collate([packed, Encoded("b", (6, 7), (0.0, 1.0))]).lengths == (2, 3, 2)


def test_row_weights_scale_tokens_and_rows():
    token = collate([Encoded("a", (1, 2, 3), (0.0, 1.0, 0.5), weight=3.0)])
    assert token.weight == pytest.approx(4.5) and token.weights_N.tolist() == [0, 3, 1.5]
    row = collate([Encoded("a", (1, 2), gold=1, weight=0.25), Encoded("b", (1,), gold=0)])
    assert row.weight == 1.25 and row.gold.dtype == torch.int64 and row.lengths == (2, 1)
    several = collate([Encoded("a", (1,), gold=(1.0, 0.0))])
    assert several.gold.tolist() == [[1.0, 0.0]]
    target = collate(
        [
            Encoded("a", (1,), target=(4, 5), target_weights=(1.0, 1.0)),
            Encoded("b", (1,), target=(6,), target_weights=(1.0,), weight=2.0),
        ]
    )
    assert target.target_M.tolist() == [4, 5, 6] and target.target_lengths == (2, 1)
    assert target.target_weights_M.tolist() == [1, 1, 2] and target.weight == 4.0 and target.tokens == 5


@pytest.mark.parametrize("by_length", [True, False])
def test_every_row_once_an_epoch_in_an_order_that_repeats(by_length):
    lengths = [(at * 37) % 101 + 1 for at in range(1003)]
    plan = plan_steps(lengths, 8, seed=1, epoch=0, by_length=by_length)
    assert sorted(row for step in plan for row in step) == list(range(1003))
    assert len(plan) == 126 and max(map(len, plan)) == 8
    assert plan == plan_steps(lengths, 8, seed=1, epoch=0, by_length=by_length)
    assert plan != plan_steps(lengths, 8, seed=1, epoch=1, by_length=by_length)
    assert plan != plan_steps(lengths, 8, seed=2, epoch=0, by_length=by_length)


def test_like_lengths_share_a_step():
    lengths = [(at * 37) % 101 + 1 for at in range(4000)]

    def padded(plan):
        return sum(len(step) * max(lengths[row] for row in step) for step in plan) / sum(lengths)

    alike = padded(plan_steps(lengths, 16, seed=0, epoch=0, by_length=True))
    mixed = padded(plan_steps(lengths, 16, seed=0, epoch=0, by_length=False))
    assert alike < 1.1 < 1.5 < mixed


@pytest.mark.parametrize("parts", [1, 3, 8, 20])
@pytest.mark.parametrize("tokens", [1, 9, 12, 1000])
def test_micro_batches_hold_each_row_once_within_their_tokens(parts, tokens):
    lengths = [5, 1, 9, 3, 7, 2, 8, 4]
    micro = split_step(range(8), lengths, parts, tokens)
    assert sorted(row for part in micro for row in part) == list(range(8))
    assert len(micro) >= min(parts, 8)
    assert all(part and (len(part) == 1 or sum(lengths[row] for row in part) <= tokens) for part in micro)
    assert micro == split_step(range(8), lengths, parts, tokens)


def test_best_fit_fills_micro_batches():
    lengths = [(at * 37) % 101 + 1 for at in range(200)]
    micro = split_step(range(200), lengths, 1, 256)
    assert sum(lengths) / (256 * len(micro)) > 0.97


def test_batches_to_judge_hold_each_row_once():
    lengths = [(at * 37) % 101 + 1 for at in range(200)]
    filled = fill_batches(lengths, 256)
    assert sorted(row for part in filled for row in part) == list(range(200))
    assert all(sum(lengths[row] for row in part) <= 256 for part in filled)


def test_segments_that_continue_a_shared_one_begin_after_its_end():
    row = Encoded("a", (1, 2, 3, 4, 5), (0.0, 0.0, 1.0, 1.0, 1.0), segments=(2, 1, 2), parents=(-1, 0, 0))
    batch = collate([Encoded("b", (9, 9)), row])
    assert batch.parents == (-1, -1, 1, 1)
    assert batch.previous_N.tolist() == [0, 0, 2, 2, 3, 3, 5]
    assert collate([Encoded("b", (9, 9))]).parents == ()
