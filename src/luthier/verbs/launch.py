"""Several processes for one tuning: those that torchrun started, or some that this one starts itself."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, LuthierError, TrainingError

if TYPE_CHECKING:
    from luthier.core.config import Resolved
    from luthier.training.world import World
    from luthier.verbs.tune import Tune

# Seconds that the other processes have for ending by themselves, and then for ending when told to.
GRACE, LAST = 20.0, 5.0


def is_started() -> bool:
    """Whether torchrun, or whoever sets its variables, started this process."""
    return all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def follows() -> bool:
    """Whether another process leads: then this one is silent."""
    return is_started() and os.environ["RANK"] != "0"


@contextmanager
def join_world(asked: Resolved[Tune], *, resume: str | None, given: bool) -> Iterator[World]:
    """The world of a tuning: the one that this process was put into, else `processes` of this machine, else it alone.

    Processes started here get the request itself and end with this one, however it ends.
    """
    from luthier.training.meeting import find_world
    from luthier.training.world import ALONE

    found, count = find_world(), asked.config.processes
    if found is not None:
        try:
            yield found
        finally:
            found.end()
    elif count == 1:
        yield ALONE
    elif given:
        raise ConfigError(
            "processes: a model that is already loaded cannot be handed to other processes; give its directory to "
            "luthier.tune, or start the program itself under torchrun"
        )
    else:
        with _started(asked, resume, count) as world:
            try:
                yield world
            finally:
                world.end()


@contextmanager
def _started(asked: Resolved[Tune], resume: str | None, count: int) -> Iterator[World]:
    from luthier.training.meeting import host_world

    followers: list[_Follower] = []

    def check() -> None:
        for follower in followers:
            follower.check()

    world, port = host_world(count, check)
    request = pickle.dumps((asked, resume))
    try:
        followers += [_Follower(rank, count, port, request) for rank in range(1, count)]
        yield world
    except BaseException:
        # Their side of the error is known; whoever still waits for us waits in vain.
        _end(followers, patience=LAST)
        raise
    else:
        _end(followers, patience=GRACE)


class _Follower:
    """A process started here. Its input stays open for as long as we live: when it ends, so does the process."""

    def __init__(self, rank: int, count: int, port: int, request: bytes):
        self.rank, self.count = rank, count
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        which = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "luthier.verbs.launch"],
            env={**os.environ, **where, **which, **paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            # Ctrl-C on the terminal is for the first process, which tells the others.
            start_new_session=True,
        )
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead already; `check` says so

    def check(self) -> None:
        """Raises TrainingError when the process has died."""
        code = self.process.poll()
        if code is None or code == 0:
            return
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise TrainingError(
            f"process {self.rank} of {self.count} {how}" + (f", and said last: {lines[-1]}" if lines else "")
        )


def _end(followers: list[_Follower], *, patience: float) -> None:
    """Wait for the processes, and end those that do not."""
    until = time.monotonic() + patience
    for follower in followers:
        if follower.process.stdin is not None and patience == LAST:
            follower.process.stdin.close()
        for seconds, end in (
            (max(0.0, until - time.monotonic()), follower.process.terminate),
            (LAST, follower.process.kill),
        ):
            try:
                follower.process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                end()
        follower.process.wait()
        if follower.process.stdin is not None:
            follower.process.stdin.close()
        follower._said.close()


def follow() -> None:
    """What a started process does: read the request, take part, end quietly. The first process speaks for all."""
    from luthier.models.lean import import_lean

    import_lean()  # before the request is read, whose parts would import transformers whole
    request: tuple[Any, str | None] = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from luthier.verbs.tune import tune_model

    try:
        tune_model(request[0], resume=request[1])
    except LuthierError as err:
        sys.exit(err.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    follow()
