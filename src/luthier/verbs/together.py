"""One model over several processes that write together: those that torchrun started. Each reads the same texts in the same
steps; the first one speaks for all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, ModelError, TrainingError
from luthier.verbs.launch import is_started

if TYPE_CHECKING:
    from luthier.training.world import World
    from luthier.verbs.generate import Generate


@contextmanager
def join_writers(config: Generate) -> Iterator[World | None]:
    """The processes that write together, this one among them, in a group; None where this one is alone.

    What ends one of them ends them all. Raises ConfigError for settings that are not for several.
    """
    if not is_started():
        yield None
        return
    from luthier.models.load import find_device
    from luthier.training.meeting import find_world

    world = find_world()
    if world is None:
        yield None
        return
    try:
        with world.guard():
            _check(config, world.size)
            world.begin(find_device(world.device(config.device)))
            yield world
    except TrainingError as err:
        # A tuning would go on from its checkpoint.
        if "--resume" not in str(err):
            raise
        raise ModelError(
            f"one of the {world.size} processes that share the model is gone, so none of them can write; start them again"
        ) from None
    finally:
        world.end()


def _check(config: Generate, size: int) -> None:
    for name in ("labels", "index", "draft", "backend"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}: {size} processes that share a model only write; leave {name} out, or start one process without torchrun"
            )


def with_seed(config: Generate, world: World | None) -> Generate:
    """The same settings with one seed for all, where chance would give each process another."""
    if world is None or config.sampling.seed is not None:
        return config
    seed = world.spread(secrets.randbits(63) if world.leads else None)
    return config.model_copy(update={"sampling": config.sampling.model_copy(update={"seed": seed})})
