"""The stages of a tuning around training: the processes joined, the weights shared out, the checkpoints, the group left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.verbs.encoding import make_feed

if TYPE_CHECKING:
    from luthier.training.checkpoint import Checkpoints
    from luthier.verbs.work import Work


def begin(work: Work) -> None:
    """Form the group of processes, now that nothing slow is left to do alone, and share out the weights if asked."""
    world = work.world
    if world.size == 1:
        if work.config.sharding == "full":
            work.events.choose("sharding", "none", "there is one process, which holds everything; set processes")
        return
    import torch

    work.events.stage(f"joining {world.size} processes")
    from luthier.models.load import find_device

    device = find_device(world.device(work.config.device)) if work.given is None else work.model.device
    world.begin(device)
    if work.hollow and work.objective.refers:
        _share_references(work)
    # Heads and adapters start at random, from the same seed on machines that need not be alike.
    start = world.spread(dict(work.parameters) if world.leads else None) if not work.hollow else {}
    with torch.no_grad():
        for name, parameter in work.parameters if start else ():
            parameter.copy_(start[name])
    del start
    work.events.choose("processes", world.size, "each learns from its share of every step; gradients are added up")
    if work.shards:
        from luthier.training.sharding import Sharded

        work.parameters = []  # the whole ones, which would stay in memory
        work.sharded = Sharded(work.model, world, device, hollow=work.hollow)
        work.parameters = list(work.config.adapter.trainable(work.model))
    # A copy of the start is made now that all begin alike, and is shared out where the weights are.
    work.objective.keep_start(work.model, work.events)


def gather(work: Work) -> None:
    """Leave the group: what is left is done by the first process, with the whole model."""
    if work.sharded is not None:
        work.sharded.gather()
    work.world.end()


def checkpoints(work: Work, path: Path) -> Checkpoints:
    """The checkpoints of the run at `path`."""
    from luthier.training.checkpoint import Checkpoints

    if work.config.sharding == "none":
        return Checkpoints(path / "checkpoints", world=work.world)
    from luthier.training.sharded_checkpoints import ShardedCheckpoints

    return ShardedCheckpoints(path / "checkpoints", world=work.world, parameters=work.parameters)


def _share_references(work: Work) -> None:
    """Give the rows what the leader's model said of them to those whose model could not."""
    for name in ("rows", "validation"):
        rows = getattr(work, name)
        told = work.world.spread([row.gold for row in rows] if work.world.leads else None)
        setattr(work, name, [replace(row, gold=gold) for row, gold in zip(rows, told, strict=True)])
    work.feed = make_feed(work)
