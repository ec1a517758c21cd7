"""Where the processes of one tuning find each other: those that torchrun started, or some that one of them starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from luthier.training.world import PATIENCE, World


def host_world(size: int, check: Callable[[], None]) -> tuple[World, int]:
    """A world of `size` processes of this machine, led by this one, and the port at which the others find its store."""
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    return World(0, size, local_size=size, store=dist.PrefixStore("luthier/1", store), check=check), store.port  # type: ignore[attr-defined]


def find_world() -> World | None:
    """The world that torchrun, or whoever set its variables or formed a group, put this process into; None: alone."""
    if dist.is_available() and dist.is_initialized():
        store: Any = dist.distributed_c10d._get_default_store()
        rank, size, formed = dist.get_rank(), dist.get_world_size(), True
    elif all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        rank, size, formed = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), False
        store = _meet(rank, size) if size > 1 else None
    else:
        return None
    if size == 1:
        return None
    _Tunings.count += 1
    return World(
        rank,
        size,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        node=os.environ.get("GROUP_RANK") or os.environ.get("NODE_RANK") or "0",
        store=dist.PrefixStore(f"luthier/{_Tunings.count}", store),  # type: ignore[attr-defined]
        formed=formed,
    )


class _Tunings:
    """How many tunings this process took part in, which keeps their words in the store apart; and that store."""

    count = 0
    store: Any = None


def _meet(rank: int, size: int) -> Any:
    if _Tunings.store is None:
        _Tunings.store = next(iter(dist.rendezvous("env://", rank, size, timeout=PATIENCE)))[0]  # type: ignore[attr-defined]
    return _Tunings.store
