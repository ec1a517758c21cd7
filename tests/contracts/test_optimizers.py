"""What every optimiser must hold: it lowers a loss, decays matrices alone, and its state survives a save."""

import io

import pytest
import torch
from torch.nn import Parameter

from luthier.training.optimizers import OPTIMIZERS


def problem():
    torch.manual_seed(0)
    matrix, vector = Parameter(torch.randn(6, 4)), Parameter(torch.randn(4))
    goal = torch.randn(6, 4)
    return [("matrix", matrix), ("vector", vector)], lambda: ((matrix + vector - goal) ** 2).sum()


@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_it_lowers_a_loss(kind):
    parameters, loss = problem()
    optimizer = OPTIMIZERS.parse(kind).build(parameters, 0.02)
    first = float(loss().detach())
    for _ in range(50):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.7 * first


@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_vectors_never_decay(kind):
    parameters, _ = problem()
    optimizer = OPTIMIZERS.parse({"kind": kind, "weight_decay": 0.1}).build(parameters, 0.01)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert decay[id(parameters[0][1])] == 0.1 and decay[id(parameters[1][1])] == 0.0
    assert all(group["base_lr"] == 0.01 for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", OPTIMIZERS.names())
def test_state_survives_a_save(kind):
    def run(interrupted):
        parameters, loss = problem()
        optimizer = OPTIMIZERS.parse(kind).build(parameters, 0.02)
        for step in range(6):
            if interrupted and step == 3:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                optimizer = OPTIMIZERS.parse(kind).build(parameters, 0.02)
                file.seek(0)
                optimizer.load_state_dict(torch.load(file, weights_only=False))
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return parameters[0][1].detach()

    assert torch.equal(run(False), run(True))
