"""What every optimiser must hold: it lowers a loss, decays matrices alone, heeds rates by weight, leaves weights without a
gradient alone, and its state survives a save."""

import io

import pytest
import torch
from torch.nn import Parameter

from luthier.choice.defaults import suit_optimizer
from luthier.training.optimizers import OPTIMIZERS

# Large enough a matrix for the optimisers that treat small ones in another way.
NAME = "layers.0.mlp.weight"


def problem(rows=6, columns=4):
    torch.manual_seed(0)
    matrix, vector = Parameter(torch.randn(rows, columns)), Parameter(torch.randn(columns))
    goal = torch.randn(rows, columns)
    return [(NAME, matrix), ("layers.0.mlp.bias", vector)], lambda: ((matrix + vector - goal) ** 2).sum()


def steps(optimizer, loss, count):
    for _ in range(count):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(6, 4), (80, 64)])
@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_it_lowers_a_loss(kind, shape):
    parameters, loss = problem(*shape)
    optimizer = OPTIMIZERS.parse(kind).build(parameters, 0.02)
    first = float(loss().detach())
    steps(optimizer, loss, 80)
    assert float(loss().detach()) < 0.7 * first


@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_vectors_never_decay(kind):
    parameters, _ = problem()
    optimizer = OPTIMIZERS.parse({"kind": kind, "weight_decay": 0.1}).build(parameters, 0.01)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert decay[id(parameters[0][1])] == 0.1 and decay[id(parameters[1][1])] == 0.0
    assert all(group["base_lr"] == 0.01 for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_a_scaled_weight_moves_as_at_the_scaled_rate(kind):
    """The gradients given do not depend on the weights, so a weight's path depends on its own rate alone."""
    part = OPTIMIZERS.parse({"kind": kind, "weight_decay": 0.1})
    found = []
    for rate, scales in ((0.01, {NAME: 0.5}), (0.005, {}), (0.01, {})):
        parameters, _ = problem(80, 64)
        optimizer = part.build(parameters, rate, scales)
        torch.manual_seed(1)
        for _ in range(3):
            for _, parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        found.append([parameter.detach() for _, parameter in parameters])
    scaled, half, full = found
    assert torch.equal(scaled[0], half[0]) and torch.equal(scaled[1], full[1])
    assert not torch.equal(scaled[0], full[0])
    bases = sorted(group["base_lr"] for group in part.build(problem()[0], 0.01, {NAME: 0.5}).param_groups)
    assert bases == [0.005, 0.01]


@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_a_weight_without_a_gradient_stays_and_may_get_one_later(kind):
    parameters, loss = problem(80, 64)
    idle = Parameter(torch.randn(80, 64))
    before = idle.detach().clone()
    part = OPTIMIZERS.parse({"kind": kind, "weight_decay": 0.1})
    optimizer = part.build([*parameters, ("layers.1.mlp.weight", idle)], 0.01)
    steps(optimizer, loss, 2)
    assert torch.equal(idle, before)
    (idle**2).sum().backward()
    optimizer.step()
    assert not torch.equal(idle, before) and torch.isfinite(idle).all()


@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_a_gradient_of_zero_does_no_harm(kind):
    """As the first matrix of a LoRA pair has: its partner starts at zero."""
    parameters, loss = problem(80, 64)
    optimizer = OPTIMIZERS.parse(kind).build(parameters, 0.02)
    before = parameters[0][1].detach().clone()
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    first = float(loss().detach())
    assert all(torch.isfinite(parameter).all() for _, parameter in parameters)
    steps(optimizer, loss, 40)
    assert float(loss().detach()) < 0.95 * first and not torch.equal(parameters[0][1], before)


@pytest.mark.parametrize("shape", [(6, 4), (80, 64)])
@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_state_survives_a_save(kind, shape):
    def run(interrupted):
        parameters, loss = problem(*shape)
        optimizer = OPTIMIZERS.parse(kind).build(parameters, 0.02)
        for step in range(6):
            if interrupted and step == 3:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                optimizer = OPTIMIZERS.parse(kind).build(parameters, 0.02)
                file.seek(0)
                optimizer.load_state_dict(torch.load(file, weights_only=False))
            steps(optimizer, loss, 1)
        return parameters[0][1].detach()

    assert torch.equal(run(False), run(True))


@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_an_average_can_be_looked_at_at_any_time(kind):
    part = OPTIMIZERS.parse(kind)
    parameters, loss = problem(80, 64)
    optimizer = part.build(parameters, 0.02)
    assert hasattr(optimizer, "eval") == hasattr(optimizer, "train") == part.averages
    if not part.averages:
        return
    found = []
    for looks in (False, True):
        parameters, loss = problem(80, 64)
        optimizer = part.build(parameters, 0.02)
        for step in range(4):
            steps(optimizer, loss, 1)
            if looks:
                before = parameters[0][1].detach().clone()
                optimizer.eval()
                assert not torch.equal(parameters[0][1], before) or step == 0
                optimizer.train()
                assert torch.equal(parameters[0][1], before)
        found.append(parameters[0][1].detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_it_says_why_another_rate_suits_it(kind):
    part = OPTIMIZERS.parse(kind)
    times = part.times(1_000_000)
    assert times > 0 and (times == 1 or part.rate_why)
    rate, why = suit_optimizer(1e-3, "full tuning", part, 1_000_000)
    assert rate == pytest.approx(1e-3 * times, rel=0.05) and (times == 1) == (why == "full tuning")
