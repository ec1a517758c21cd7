"""The random generators: put back, of the device that trains, and earlier checkpoints' too."""

import random

import numpy as np
import torch

from luthier.training.draws import draw_state, restore_draws

HOST = torch.device("cpu")


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_generators_are_put_back():
    state = draw_state(HOST)
    first = drawn()
    restore_draws(state, HOST)
    assert drawn() == first


def test_the_state_of_the_device_that_trains_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or torch.zeros(3))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: asked.append(device))
    second = torch.device("cuda:1")
    restore_draws(draw_state(second), second)
    draw_state(HOST)
    assert asked == [second, second]


def test_checkpoints_from_before_can_be_read():
    restore_draws({**draw_state(HOST), "cuda": []}, HOST)
    restore_draws({**draw_state(HOST), "cuda": []}, torch.device("cuda"))
