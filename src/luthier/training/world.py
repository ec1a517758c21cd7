"""The processes that train one model together: which one this is, and what they tell each other.

Before their group is formed they speak through a store, in which nothing runs out of time: reading and encoding data may
take as long as it takes. Then sums, gradients and weights go through the group.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from luthier.core import errors
from luthier.core.errors import ConfigError, LuthierError, TrainingError
from luthier.training.gradients import add_up
from luthier.training.signals import watch_signals
from luthier.training.trees import fill, lift

# How long a process waits for the others inside one exchange on the host, and between looks into the store (seconds).
PATIENCE, PAUSE = timedelta(minutes=30), 0.05
# The same on the devices. What may take long (writing a checkpoint, rewards, a stream) is followed by an exchange on the
# host, where a process that died is noticed at once; NCCL notices nothing, and only time ends the waiting.
DEVICE_PATIENCE = timedelta(minutes=5)
# How long after a broken exchange the reason for it may take to arrive (seconds).
GRACE = 5.0


class World:
    """The processes of one tuning. A world of one is the default, asks nobody and costs nothing.

    `rank` of `size`; `local_rank` among those of this machine; `node` names the machine. The process of rank 0 leads:
    it alone writes the run. `check` raises when a process that this one started has died.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        local_rank: int = 0,
        local_size: int = 1,
        node: str = "0",
        store: Any = None,
        formed: bool = False,
        check: Callable[[], None] = lambda: None,
    ):
        self.rank, self.size, self.local_rank, self.local_size, self.node = rank, size, local_rank, local_size, node
        self._store, self._formed, self._ours, self._check = store, formed, False, check
        self._host: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes the run."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process where `asked` leaves a choice. Raises ConfigError where there are too few."""
        if self.size == 1 or asked not in ("auto", "cuda") or not torch.cuda.is_available():
            return asked
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{self.local_size} processes share {torch.cuda.device_count()} CUDA devices here; start one for each, or "
                "set device: cpu"
            )
        return f"cuda:{self.local_rank}"

    def threads(self, asked: int | None) -> int | None:
        """Processor threads of this process: its part of the cores, unless told; None: as torch has them."""
        if asked or self.size == 1 or "OMP_NUM_THREADS" in os.environ:
            return asked
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // self.local_size)

    # -- before there is a group --------------------------------------------------------------------------------------

    def tell(self, key: str, value: str) -> None:
        """Leave `value` for the other processes."""
        if self._store is not None:
            self._store.set(key, value)

    def hear(self, key: str) -> str:
        """What was left under `key`, waiting for it. Raises what ended another process meanwhile."""
        assert self._store is not None
        while not self._known(key):
            time.sleep(PAUSE)
            failure = self._failure()
            if failure is not None:
                raise failure
            self._check()
        return str(self._store.get(key).decode())

    def await_all(self, what: str) -> None:
        """Wait until every process has come this far."""
        if self._store is None:
            return
        self.tell(f"{what}/{self.rank}", "")
        for rank in range(self.size):
            self.hear(f"{what}/{rank}")

    def begin(self, device: torch.device) -> None:
        """Form the group, once every process is ready for it."""
        if self._formed and dist.get_backend() == "nccl":
            self._host = dist.new_group(backend="gloo", timeout=PATIENCE)  # what lies on the host avoids NCCL
        if self.size == 1 or self._formed:
            return
        self.await_all("ready")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        assert self._store is not None
        dist.init_process_group(
            "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl",
            store=dist.PrefixStore("group", self._store),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
            timeout=PATIENCE if device.type == "cpu" else DEVICE_PATIENCE,
        )
        if device.type != "cpu":
            self._host = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._formed = self._ours = True

    def end(self) -> None:
        """Dissolve the group, if it was formed here, whatever became of it."""
        if self._ours:
            dist.destroy_process_group()
        self._formed = self._ours = False
        self._host = None

    # -- exchanges: each is made by all processes, in the same order ---------------------------------------------------

    def sum(self, *values: float) -> list[float]:
        """Each of `values` added up over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._host)
        return total.tolist()

    def most(self, value: int) -> int:
        """The largest `value` of any process."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._host)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return bool(self.most(int(flag)))

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._host)
        return found

    def spread(self, tree: Any) -> Any:
        """What the leader holds, in every process: containers of plain values and tensors, which arrive on the host."""
        if self.size == 1:
            return tree
        tensors: list[Tensor] = []
        held = [lift(tree, tensors) if self.leads else None]
        dist.broadcast_object_list(held, group=self._host, device=torch.device("cpu"))
        return fill(held[0], iter(tensors) if self.leads else None, self._host)

    def add_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Add up every gradient over all processes. One that has none adds nothing; where none has any, none is made."""
        if self.size > 1 and parameters:
            add_up(parameters, self._host)

    # -- failing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Inside, what ends one process ends them all, each with the error of the first that failed."""
        try:
            yield
        except BaseException as err:
            if self.size == 1:
                raise
            cause: BaseException | None = None
            if _is_broken_exchange(err):
                with watch_signals():  # torchrun tells the others to end as soon as one is dead; first the run says why
                    cause = self._await_failure(err)
            if cause is not None:
                raise cause from None
            self._report(err)
            raise

    def _report(self, err: BaseException) -> None:
        """Tell the others why this process ends, unless one was first."""
        if isinstance(err, LuthierError):
            told = (type(err).__name__, str(err))
        elif isinstance(err, KeyboardInterrupt):
            told = ("KeyboardInterrupt", str(err))
        else:
            told = ("TrainingError", f"process {self.rank} of {self.size} failed: {_first_line(err)}")
        try:
            if not self._known("failed"):
                self.tell("failed", json.dumps([self.rank, *told]))
        except RuntimeError:
            pass  # the store went with the process that held it: there is nobody to tell

    def _failure(self) -> BaseException | None:
        """The error of another process, if one has failed."""
        if not self._known("failed"):
            return None
        assert self._store is not None
        rank, kind, text = json.loads(self._store.get("failed"))
        if rank == self.rank:
            return None
        if kind == "KeyboardInterrupt":
            return KeyboardInterrupt(text)
        return getattr(errors, kind, TrainingError)(text) if kind != "MissingExtra" else TrainingError(text)

    def _await_failure(self, err: BaseException) -> BaseException:
        """What broke an exchange: the error of another process, if one arrives soon enough, else which do not answer."""
        end, left = time.monotonic() + GRACE, f"left/{self.rank}"
        while time.monotonic() < end:
            try:
                self.tell(left, "")
                failure = self._failure()
                self._check()
            except LuthierError as found:
                return found
            except RuntimeError:
                return TrainingError(f"process {self.rank} of {self.size} lost the first one, which holds the run")
            if failure is not None:
                return failure
            time.sleep(PAUSE)
        gone = [str(rank) for rank in range(self.size) if not self._known(f"left/{rank}")]
        if not gone:
            return TrainingError(f"the {self.size} processes lost each other: {_first_line(err)}; go on with --resume")
        return TrainingError(
            f"process {', '.join(gone)} of {self.size} does not answer any more: it was killed, or its machine is gone; go on "
            "from the last checkpoint with --resume"
        )

    def _known(self, key: str) -> bool:
        return self._store is not None and self._store.check([key])


ALONE = World()


def _is_broken_exchange(err: BaseException) -> bool:
    """Whether the others are the reason: torch has no type of its own for what gloo says."""
    return isinstance(err, RuntimeError) and (isinstance(err, dist.DistError) or "gloo" in str(err).lower())


def _first_line(err: BaseException) -> str:
    return f"{type(err).__name__}: {err}".strip().split("\n")[0]
