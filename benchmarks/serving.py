"""How many tokens a second a server writes for 1, 8 and 32 clients, and how long they wait, beside other servers.

    python benchmarks/serving.py [--quick] [--peers transformers,llama] [--clients 1,8,32]

The 135M shape with random weights, saved in bf16 (rows of the output layer that the tokenizer has no text for, and
those of special tokens, are 0, so that every token is text and none ends an answer). Each client sends one request
after the other, streamed: chats of 64 to 256 tokens, 64 to 128 to write, greedy, at least as many requests as
clients. `luthier serve` as it starts by itself; `transformers serve` as it starts by itself and with continuous
batching; llama.cpp's server with a slot for each client, weights in Q8_0 and Q4_0 (it gets the same number of token
ids, for its file has no real tokenizer). One server at a time, the same load, tokens counted as they were asked for.
`first` is seconds to the first text, `between` seconds from one text to the next (50th and 99th percentile). What the
server loses of the engine alone is in overhead.py. Writes benchmarks/results/serving-135m.json; the last line printed is
the same object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from peers.environment import llama_server, peer_python
from shapes import WORDS, make_model

from luthier.native.library import kernels

HERE = Path(__file__).parent
FORMS = ("Q8_0", "Q4_0")
# Seconds after which a server is taken to give no figure.
PATIENCE = 400.0
READY = 180.0
# Of an event or a body that holds text.
TEXT = re.compile(rb'"content":\s?"[^"]')


def make_spoken(folder: Path) -> Path:
    """The 135M shape, of whose tokens only those with a text come."""
    path = folder / "135m-spoken"
    if not (path / "model.safetensors").exists():
        from safetensors.torch import load_file, save_file
        from transformers import AutoTokenizer

        source = make_model("135m", folder)
        shutil.copytree(source, path, dirs_exist_ok=True)
        tensors = load_file(source / "model.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(source)
        head = tensors["lm_head.weight"]
        head[len(tokenizer) :] = 0
        head[sorted(tokenizer.added_tokens_decoder)] = 0
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def make_load(count: int, seed: int) -> list[tuple[str, int]]:
    """(a question, tokens to write) of each request."""
    draw, words = random.Random(seed), WORDS.split()
    return [(" ".join(draw.choices(words, k=draw.randint(60, 240))), draw.randint(64, 128)) for _ in range(count)]


async def ask(url: httpx.URL, path: str, body: dict[str, Any]) -> list[float]:
    """Seconds to each text of an answer. Bytes are looked through for texts and not parsed: on few cores what the client does is
    taken from the server."""
    reader, writer = await asyncio.open_connection(url.host, url.port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {url.host}:{url.port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    began, found, status = time.perf_counter(), list[float](), b""
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    while piece := await reader.read(65536):
        status = status or piece[:16]
        found += [time.perf_counter() - began] * len(TEXT.findall(piece))
    writer.close()
    if b" 200 " not in status or not found:
        raise RuntimeError(f"{url} answered {status!r}")
    return found


async def drive(url: str, path: str, clients: int, bodies: list[dict[str, Any]]) -> tuple[float, list[list[float]]]:
    """Seconds for all, and those of each answer's texts."""
    waiting, found = list(bodies), []

    async def one() -> None:
        while waiting:
            found.append(await ask(httpx.URL(url), path, waiting.pop(0)))

    began = time.perf_counter()
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(one() for _ in range(clients)))
    return time.perf_counter() - began, found


def measure(url: str, kind: str, model: str, clients: int, load: list[tuple[str, int]]) -> dict[str, Any]:
    """Of one server under one load."""
    path, bodies = requests(kind, model, load)
    short = "n_predict" if kind == "llama" else "max_tokens"
    asyncio.run(drive(url, path, 1, [bodies[0] | {short: 8}]))
    seconds, answers = asyncio.run(drive(url, path, clients, bodies))
    gaps = [after - before for one in answers for before, after in pairwise(one)]
    firsts = [one[0] for one in answers if one]
    return {
        "tokens_per_second": round(sum(tokens for _, tokens in load) / seconds, 1),
        "first_p50": percentile(firsts, 50), "first_p99": percentile(firsts, 99),
        "between_p50": percentile(gaps, 50), "between_p99": percentile(gaps, 99),
    }  # fmt: skip


def requests(
    kind: str, model: str, load: list[tuple[str, int]], stream: bool = True
) -> tuple[str, list[dict[str, Any]]]:
    """Where they are sent, and their bodies."""
    if kind == "llama":
        draw = random.Random(0)
        return "/completion", [
            {"prompt": [draw.randrange(5, 30000) for _ in text.split()], "n_predict": tokens, "stream": stream, "temperature": 0,
             "ignore_eos": True, "cache_prompt": False}
            for text, tokens in load
        ]  # fmt: skip
    return "/v1/chat/completions", [
        {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": stream}
        | ({"temperature": 0} if kind == "luthier" else {})
        for text, tokens in load
    ]


def percentile(values: list[float], share: int) -> float | None:
    if not values:
        return None
    return round(sorted(values)[min(len(values) - 1, len(values) * share // 100)], 4)


@contextmanager
def running(command: list[str], url: str | None, path: str) -> Iterator[str]:
    """A server's address, from when it answers at `path`; None: it says itself where it is."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "LANG": "C"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if url is None else subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    try:
        if url is None:
            assert process.stderr is not None
            url = next(found[1] for line in process.stderr if (found := re.search(r"listening at (http\S+)", line)))
        end = time.monotonic() + READY
        while True:
            try:
                if httpx.get(url + path, timeout=30).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if time.monotonic() > end or process.poll() is not None:
                raise RuntimeError(f"{command[0]} did not answer")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def servers(
    model: Path, folder: Path, peers: list[str], most: int
) -> Iterator[tuple[str, str, list[str], str | None, str]]:
    """(name, kind, command, address, where it tells that it is there) of each."""
    yield (
        "luthier",
        "luthier",
        [sys.executable, "-m", "luthier", "serve", f"spoken={model}", "--port", "0"],
        None,
        "/health/live",
    )
    if "transformers" in peers:
        command = [
            str(Path(sys.executable).parent / "transformers"),
            "serve",
            str(model),
            "--device",
            "cpu",
            "--dtype",
            "bfloat16",
        ]
        for at, (name, more) in enumerate((("transformers", []), ("transformers-batching", ["--continuous-batching"]))):
            yield (
                name,
                "transformers",
                [*command, *more, "--port", str(8450 + at)],
                f"http://localhost:{8450 + at}",
                "/health",
            )
    if "llama" in peers:
        for at, form in enumerate(FORMS):
            file = folder / f"135m-spoken-{form}.gguf"
            if not file.exists():
                script = (
                    f"import sys; sys.path.insert(0, {str(HERE / 'peers')!r}); from pathlib import Path; "
                    f"from writing_llama import convert; convert(Path({str(model)!r}), Path({str(file)!r}), {form!r})"
                )
                subprocess.run([peer_python("llama"), "-c", script], check=True)
            command = [
                llama_server(),
                "-m",
                str(file),
                "--port",
                str(8460 + at),
                "-np",
                str(most),
                "-c",
                str(most * 512),
                "-t",
                "2",
            ]
            yield f"llama-{form}", "llama", command, f"http://127.0.0.1:{8460 + at}", "/health"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 clients, no peers, nothing is written")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--peers", default="transformers,llama")
    parser.add_argument("--repeats", type=int, default=1)
    found = parser.parse_args()
    clients = [4] if found.quick else [int(one) for one in found.clients.split(",")]
    peers = [] if found.quick else found.peers.split(",")
    folder = HERE.parent / "build" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    model = make_spoken(folder)
    loads = {count: make_load(max(4, count), count) for count in clients}
    most = max(clients)
    systems: dict[str, Any] = {}
    for repeat in range(1 if found.quick else found.repeats):
        for name, kind, command, url, path in servers(model, folder, peers, most):
            if isinstance(systems.get(name), str):
                continue
            named = "spoken" if kind == "luthier" else str(model)
            try:
                with running(command, url, path) as address:
                    for count in clients:
                        one = measure(address, kind, named, count, loads[count])
                        systems.setdefault(name, {}).setdefault(str(count), []).append(one)
                        print(name, count, one, flush=True)
            except (RuntimeError, TimeoutError, httpx.HTTPError) as err:
                systems[name] = f"no figure: {type(err).__name__} {err}"
                print(name, systems[name], flush=True)
        print("repeat", repeat + 1, flush=True)
    medians = {
        name: one if isinstance(one, str) else {count: middle(values) for count, values in one.items()}
        for name, one in systems.items()
    }
    ours = medians["luthier"][str(most)]["tokens_per_second"]
    peer = {
        name: one[str(most)]["tokens_per_second"]
        for name, one in medians.items()
        if name != "luthier" and not isinstance(one, str)
    }
    result = {
        "benchmark": "serving", "shape": "135m", "kernels": kernels(), "threads": os.cpu_count(), "repeats": found.repeats,
        "systems": medians,
        "ours": ours, "peer": peer, "ratio": {name: round(ours / value, 2) for name, value in peer.items()},
    }  # fmt: skip
    if not found.quick:
        (HERE / "results" / "serving-135m.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def middle(values: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure."""
    return {
        name: None if values[0][name] is None else round(statistics.median(one[name] for one in values), 4)
        for name in values[0]
    }


if __name__ == "__main__":
    main()
