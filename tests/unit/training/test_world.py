"""A step dealt out, and processes that fail: the others end with the same error, soon."""

import multiprocessing
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist

from luthier.core.errors import ConfigError, DataError, TrainingError
from luthier.data.batches import deal
from luthier.training.optimizers import OPTIMIZERS
from luthier.training.sharding import check_sharding
from luthier.training.world import ALONE, DEVICE_PATIENCE, PATIENCE, World

# Two exchanges of a world of two; then what the test asks for. The first process is the test itself.
FOLLOWER = """
import sys
from torch.distributed import TCPStore, PrefixStore
import torch
from luthier.core.errors import DataError
from luthier.training.world import World

store = TCPStore("127.0.0.1", int(sys.argv[1]), 2, is_master=False)
world = World(1, 2, store=PrefixStore("test", store))
with world.guard():
    assert world.hear("word") == "tea"
    world.begin(torch.device("cpu"))
    assert world.sum(1.0, 0.25) == [3.0, 0.75] and world.most(3) == 5 and world.any(False) is True
    assert world.gather("b") == ["a", "b"]
    tree = world.spread(None)
    assert tree["list"][0].tolist() == [1, 2] and tree["plain"] == ("x", None)
    one, two, three = (torch.nn.Parameter(torch.zeros(size)) for size in (3, 2, 2))
    two.grad = torch.ones(2)
    world.add_gradients([one, two, three])
    assert one.grad.tolist() == [1, 1, 1] and two.grad.tolist() == [3, 3] and three.grad is None
    {then}
"""


def test_rows_are_dealt_by_tokens_and_each_once():
    # 9 | 8, 7 joins 8?  By hand: 9 to the first, 8 to the second, 7 to the second (8 < 9), 3 and 2 to the first.
    assert deal([3, 9, 7, 8, 2], 2) == [[0, 1, 4], [2, 3]]
    assert deal([5, 5], 3) == [[0], [1], []]
    assert deal([4, 6], 1) == [[0, 1]] and deal([], 2) == [[], []]


def exchange(then: str) -> tuple[World, subprocess.Popen]:
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    script = textwrap.dedent(FOLLOWER).replace("{then}", then)
    process = subprocess.Popen([sys.executable, "-c", script, str(store.port)], stderr=subprocess.PIPE, text=True)
    world = World(0, 2, store=dist.PrefixStore("test", store))
    world.tell("word", "tea")
    world.begin(torch.device("cpu"))
    assert world.sum(2.0, 0.5) == [3.0, 0.75] and world.most(5) == 5 and world.any(True) is True
    assert world.gather("a") == ["a", "b"]
    world.spread({"list": [torch.tensor([1, 2])], "plain": ("x", None)})
    one, two, three = (torch.nn.Parameter(torch.zeros(size)) for size in (3, 2, 2))
    one.grad, two.grad = torch.ones(3), torch.full((2,), 2.0)
    world.add_gradients([one, two, three])
    assert one.grad.tolist() == [1, 1, 1] and two.grad.tolist() == [3, 3] and three.grad is None
    return world, process


@pytest.fixture(autouse=True)
def apart():
    """A test that fails while it is in a group must not leave the next ones in it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_error_of_one_is_the_error_of_all():
    world, process = exchange("raise DataError('row 7 is bad')")
    with pytest.raises(DataError, match=r"^row 7 is bad$"), world.guard():
        world.sum(1.0)
    assert "row 7 is bad" in process.communicate(timeout=30)[1] and process.returncode == 1
    world.end()


def test_one_that_is_killed_is_named(monkeypatch):
    monkeypatch.setattr("luthier.training.world.GRACE", 1.0)
    world, process = exchange("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TrainingError, match=r"^process 1 of 2 does not answer any more"), world.guard():
        world.sum(1.0)
    process.communicate(timeout=30)
    world.end()


def test_an_error_of_its_own_is_not_taken_for_a_lost_process():
    world = World(0, 2, store=dist.HashStore())
    with pytest.raises(RuntimeError, match=r"^shapes$"), world.guard():
        raise RuntimeError("shapes")


def test_devices_wait_less_than_hosts(monkeypatch):
    asked = []
    monkeypatch.setattr(dist, "init_process_group", lambda *rest, **more: asked.append(more["timeout"]))
    monkeypatch.setattr(dist, "new_group", lambda **more: asked.append(more["timeout"]))
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    store = dist.HashStore()
    store.set("ready/1", "")
    world = World(0, 2, store=store)
    world.begin(torch.device("cuda", 0))
    assert asked == [DEVICE_PATIENCE, PATIENCE] and DEVICE_PATIENCE < PATIENCE
    world._ours = False


def test_alone_nothing_is_asked():
    assert ALONE.sum(1.5, 2.0) == [1.5, 2.0] and ALONE.most(2) == 2 and ALONE.gather(1) == [1] and ALONE.spread(3) == 3
    assert ALONE.device("auto") == "auto" and ALONE.threads(None) is None and ALONE.leads
    assert not multiprocessing.active_children() and not dist.is_initialized()


def test_threads_are_the_cores_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert World(1, 4, local_size=4).threads(None) == 4 and World(1, 4, local_size=4).threads(3) == 3
    assert World(1, 64, local_size=64).threads(None) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert World(1, 4, local_size=4).threads(None) is None


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_only_what_moves_value_by_value_can_be_sharded(name):
    optimizer = OPTIMIZERS.parse(name)
    if name in ("sgd", "adam", "adamw", "lion", "schedule_free"):
        check_sharding(optimizer)
    else:
        with pytest.raises(ConfigError, match=f"'{name}' needs whole matrices"):
            check_sharding(optimizer)
