"""What the tests of writing share: models that never end by themselves, and prompts of any length."""

import random

from tiny import tiny_loaded


def endless(family="llama", **options):
    model = tiny_loaded(family, **options)
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    return model


def prompts(sizes, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(5, 390) for _ in range(size)] for size in sizes]
