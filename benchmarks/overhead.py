"""What the server loses of the engine's throughput when 32 clients ask, streamed and whole.

    python benchmarks/overhead.py [--quick] [--rounds 8] [--ways bare,streamed,whole]

The same 96 chats as in `serving.py` (64 to 256 tokens, 64 to 128 to write, greedy), in three ways: `bare` is the engine alone
in a process of its own, which gets all of them at once; `streamed` and `whole` are `luthier serve` as it starts by itself,
asked by 32 clients, each of which sends one request after the other. Both processes stay loaded; each round has every way once,
in turn, with texts of its own, which are the same for all ways; nothing that one way read is reused by another.

On few cores what a client does is taken from the server, and the engine alone has no client. So the client here does next to
nothing: its sockets ask to be woken at the end of an answer alone (SO_RCVLOWAT), as if it sat on another machine, and it looks
at the bytes after the clock has stopped. What it took all the same is said (`client`).

`overhead` is the median over the rounds of the share that is lost of `bare` in the same round. `microseconds` are those of a
processor for a token, of the server's process, of the engine's process outside of its own thread, and of the client. Writes
benchmarks/results/overhead-135m.json; the last line printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from luthier.native.library import kernels
from serving import HERE, make_load, make_spoken, requests, running

REQUESTS, CLIENTS = 96, 32
WAYS = ("bare", "streamed", "whole")
# More than any answer has.
ALL = 2**20
LONG = re.compile(rb'"finish_reason":\s?"length"')
BARE = """
import json, sys, time
from luthier.core.events import Events
from luthier.engine.engine import Engine
from luthier.engine.generate import add_answer, choose_engine
from luthier.engine.native import let_go
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model
source, clients = sys.argv[1], int(sys.argv[2])
model = load_model(source, as_stored=True)
choose_engine(model, Sampling(), "auto", Events())
let_go(model)
engine = Engine(model, clients * (model.spec.max_length + 64), streams=clients)
print(flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    for text, tokens in json.loads(line):
        add_answer(engine, model.renderer.prompt(text), Sampling(max_tokens=tokens))
    engine.run()
    print(time.perf_counter() - began, flush=True)
"""


class Bare:
    """The engine alone, in a process of its own."""

    def __init__(self, model: Path):
        command = [sys.executable, "-c", BARE, str(model), str(CLIENTS)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self._line()

    def __call__(self, load: list[tuple[str, int]]) -> float:
        """Seconds for all."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(load) + "\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the engine alone ended")
        return line


def drive(url: httpx.URL, path: str, bodies: list[dict[str, Any]]) -> tuple[float, float, list[bytes]]:
    """Seconds for all, seconds of a processor that the clients took, and the answers."""
    waiting = [_sent(url, path, body) for body in reversed(bodies)]
    selector, found, going = selectors.DefaultSelector(), list[bytes](), 0
    took, began = time.process_time(), time.perf_counter()

    def ask() -> int:
        if not waiting:
            return 0
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, ALL)
        one.connect((url.host, url.port))
        one.sendall(waiting.pop())
        selector.register(one, selectors.EVENT_READ)
        return 1

    for _ in range(CLIENTS):
        going += ask()
    while going:
        for key, _ in selector.select():
            one = key.fileobj
            assert isinstance(one, socket.socket)
            pieces = list[bytes]()
            while piece := one.recv(ALL):
                pieces.append(piece)
            found.append(b"".join(pieces))
            selector.unregister(one)
            one.close()
            going += ask() - 1
    return time.perf_counter() - began, time.process_time() - took, found


def _sent(url: httpx.URL, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {url.host}:{url.port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def check(answers: list[bytes], streamed: bool) -> None:
    """Raises RuntimeError where an answer is not whole, or ended by itself."""
    for one in answers:
        whole = not streamed or one.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        if b" 200 " not in one[:16] or not whole or len(LONG.findall(one)) != 1:
            raise RuntimeError(f"the server answered {one[:200]!r} ... {one[-100:]!r}")


def _tokens(load: list[tuple[str, int]]) -> int:
    return sum(tokens for _, tokens in load)


def spent(pid: int) -> dict[str, int]:
    """Nanoseconds of a processor that each thread of a process took."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = "first" if task.name == str(pid) else task.name
        found[name] = int((task / "schedstat").read_text().split()[0])
    return found


def child_of(pid: int) -> int:
    """The only child of a process."""
    (found,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found)


def pid_at(url: httpx.URL) -> int:
    """The child of this process that listens at an address."""
    for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return int(pid)
    raise RuntimeError(f"no server of ours at {url}")


class Served:
    """The server, asked in one way."""

    def __init__(self, address: str):
        self._url = httpx.URL(address)
        self._server = pid_at(self._url)
        self._engine = child_of(self._server)
        self.microseconds: dict[str, list[dict[str, float]]] = {}

    def __call__(self, way: str, load: list[tuple[str, int]], seed: int) -> float:
        path, bodies = requests("luthier", "spoken", load, way == "streamed")
        # What one user's texts left is not reused for another's.
        bodies = [body | {"user": f"{way} {seed}"} for body in bodies]
        before = spent(self._server), spent(self._engine)
        seconds, client, answers = drive(self._url, path, bodies)
        after = spent(self._server), spent(self._engine)
        check(answers, way == "streamed")
        tokens = _tokens(load) / 1e6
        self.microseconds.setdefault(way, []).append({
            "server": sum(after[0][name] - before[0].get(name, 0) for name in after[0]) / 1e9 / tokens,
            "engine_loop": (after[1]["first"] - before[1]["first"]) / 1e9 / tokens,
            "client": client / tokens,
        })  # fmt: skip
        return seconds


def measure(model: Path, rounds: int, ways: tuple[str, ...]) -> dict[str, Any]:
    """Every way, in turn."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    command = [sys.executable, "-m", "luthier", "serve", f"spoken={model}", "--port", "0"]
    bare = Bare(model) if "bare" in ways else None
    try:
        with running(command, None, "/health/live") as address:
            served = Served(address)
            # The first round warms up.
            for seed in range(rounds + 1):
                load = make_load(REQUESTS, 100 + seed)
                for way in [*ways[seed % len(ways) :], *ways[: seed % len(ways)]]:
                    seconds = served(way, load, seed) if bare is None or way != "bare" else bare(load)
                    found[way].append(_tokens(load) / seconds)
                print({way: round(found[way][-1]) for way in ways}, flush=True)
    finally:
        if bare is not None:
            bare.close()
    kept = {way: values[1:] for way, values in found.items()}
    lost = {
        way: [1 - one / other for one, other in zip(kept[way], kept["bare"])]
        for way in ways
        if way != "bare" and "bare" in ways
    }
    return {
        "benchmark": "overhead", "shape": "135m", "kernels": kernels(), "threads": os.cpu_count(), "clients": CLIENTS,
        "rounds": rounds,
        "tokens_per_second": {way: round(statistics.median(values), 1) for way, values in kept.items()},
        "overhead": {way: round(statistics.median(values), 3) for way, values in lost.items()},
        "overhead_of_rounds": {way: [round(one, 3) for one in values] for way, values in lost.items()},
        "microseconds": {
            way: {name: round(statistics.median(one[name] for one in values[1:]), 1) for name in values[0]}
            for way, values in served.microseconds.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, and nothing is written")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--ways", default=",".join(WAYS))
    found = parser.parse_args()
    folder = HERE.parent / "build" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    result = measure(make_spoken(folder), 1 if found.quick else found.rounds, tuple(found.ways.split(",")))
    if not found.quick and set(WAYS) == set(found.ways.split(",")):
        (HERE / "results" / "overhead-135m.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
