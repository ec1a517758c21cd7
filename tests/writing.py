"""What the tests of writing share: models that never end by themselves, and prompts of any length."""

import random

from luthier.models.load import load_model
from tiny import tiny_model


def endless(family="llama", **options):
    model = load_model(str(tiny_model(family)), **options)
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    return model


def prompts(sizes, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(5, 390) for _ in range(size)] for size in sizes]
