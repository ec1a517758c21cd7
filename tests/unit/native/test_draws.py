"""Tokens drawn by the C kernel are those of plain torch, but where a draw falls within rounding of the border between two."""

import pytest
import torch

from luthier.engine.choose import drawn_from, shares_of
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling
from luthier.native.draws import Draw, can_draw, draw_rows

NAN = float("nan")
SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 7.0},
    {"temperature": 1e-4},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"top_p": 1.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 2000},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 40, "min_p": 0.3},
    {"top_p": 0.95, "min_p": 0.05, "temperature": 0.7},
    {"top_k": 300, "top_p": 0.97, "min_p": 0.001},
]


def scores(width, spread, seed=0):
    return torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) * spread


def draw_of(settings, number) -> Draw:
    return Draw(number, **{"temperature": 1.0, **settings})


def shares(row_V, settings):
    sampling = Sampling(**{"temperature": 1.0, **settings})
    return shares_of(row_V, Request((1,), sampling, 8, 0, lambda _: 0.5))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("width", "spread"), [(61, 3.0), (5000, 4.0), (4096, 0.1), (9001, 30.0)])
def test_the_kernel_draws_what_torch_draws(settings, width, spread):
    row_1V = scores(width, spread)
    assert can_draw(row_1V)
    numbers = torch.linspace(1e-9, 1 - 1e-9, 201, dtype=torch.float64).tolist()
    found = [draw_rows(row_1V, [0], [draw_of(settings, number)])[0] for number in numbers]
    shares_K, tokens_K = shares(row_1V[0], settings)
    borders = [
        {drawn_from(shares_K, tokens_K, min(max(number + by, 0), 1)) for by in (0, -2e-5, 2e-5)} for number in numbers
    ]
    assert all(token in some for token, some in zip(found, borders))
    exact = sum(token == drawn_from(shares_K, tokens_K, number) for token, number in zip(found, numbers))
    # Tokens with a share below 2e-5 of a flat row lie close together.
    assert exact > (120 if spread < 1 else 195)


def test_what_cannot_come_is_never_drawn():
    row_1V = torch.full((1, 9000), -torch.inf)
    row_1V[0, 8000], row_1V[0, 4100] = 2.0, 1.0
    for settings in SETTINGS:
        found = {draw_rows(row_1V, [0], [draw_of(settings, number)])[0] for number in (0.0, 1e-300, 0.3, 0.99, 1.0)}
        assert found <= {4100, 8000}, settings
    assert draw_rows(row_1V, [0], [draw_of({}, 0.0)]) == [4100]
    assert draw_rows(row_1V, [0], [draw_of({}, 1.0)]) == [8000]


def test_equal_scores_come_in_the_order_of_the_vocabulary():
    row_1V = torch.zeros(1, 1000)
    row_1V[0, ::2] = -0.0
    assert [draw_rows(row_1V, [0], [draw_of({"top_k": 4}, at / 4 + 0.1)])[0] for at in range(4)] == [0, 1, 2, 3]
    assert [draw_rows(row_1V, [0], [draw_of({"top_p": 0.004}, at / 4 + 0.1)])[0] for at in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_scores_that_are_no_numbers_are_told(settings):
    for value in (NAN, torch.inf):
        row_1V = scores(300, 1.0)
        row_1V[0, 217] = value
        assert draw_rows(row_1V, [0], [draw_of(settings, 0.5)]) == [-1]
    assert draw_rows(torch.full((1, 300), -torch.inf), [0], [draw_of(settings, 0.5)]) == [-1]


def test_a_row_gets_nothing_from_those_beside_it():
    wide_RV = torch.cat([scores(777, 2.0, seed) for seed in range(12)])
    draws = [draw_of(SETTINGS[at], at / 12) for at in range(12)]
    together = draw_rows(wide_RV, range(12), draws)
    assert together == [draw_rows(wide_RV, [at], [draws[at]])[0] for at in range(12)]
    assert draw_rows(wide_RV[:, :777:1], [11, 3], [draws[11], draws[3]]) == [together[11], together[3]]


def test_shares_of_many_draws_are_those_of_the_softmax():
    row_1V = scores(12, 1.0)
    found = draw_rows(
        row_1V.expand(20_000, 12).contiguous(),
        range(20_000),
        [draw_of({}, (at + 0.5) / 20_000) for at in range(20_000)],
    )
    counts_V = torch.bincount(torch.tensor(found), minlength=12) / 20_000
    torch.testing.assert_close(counts_V, row_1V[0].softmax(-1), atol=1e-4, rtol=0)
