"""The random generators that training draws from: their state, put back, and parted between processes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from luthier.training.world import World


def draw_state(device: torch.device) -> dict[str, Any]:
    """State of every generator that training on `device` may draw from."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        # Of this process's device alone: asking the others would take memory on them.
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_draws(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back where `draw_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    # Earlier checkpoints hold a list of those of all devices, empty where there was none.
    if isinstance(state["cuda"], torch.Tensor) and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def part_draws(world: World, seed: int, step: int) -> None:
    """Let each process draw numbers of its own (dropout) in a step; those of the first go on, and lie in checkpoints."""
    if not world.leads:
        numbers = np.random.SeedSequence([seed, world.rank, step]).generate_state(3)
        random.seed(int(numbers[0]))
        np.random.seed(numbers[1])
        torch.manual_seed(int(numbers[2]))
