"""Models of the hub, from a small hub on this machine: loaded, cached, used without it; and what is said when it says no."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from decoders import MADE, decoder_model
from luthier.native.build import library_path
from luthier.native.library import why_no_decoder
from tiny import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Names that the hub does not give out, and how it says so.
REFUSED = {
    "owner/missing": (404, "RepoNotFound"),
    "owner/private": (401, "RepoNotFound"),
    "owner/gated": (403, "GatedRepo"),
}
# Commands one after the other in a fresh process, which reads its environment anew: code, seconds and words of each.
SCRIPT = """
import contextlib, io, json, sys, time
from luthier.models.lean import import_lean
import_lean()
from luthier.faces.cli.main import main
for arguments in json.loads(sys.argv[1]):
    said, wrong, started = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        code = main(arguments)
    print(json.dumps([code, time.monotonic() - started, said.getvalue(), wrong.getvalue()]), flush=True)
"""


class Hub(BaseHTTPRequestHandler):
    """What https://huggingface.co answers for the files of a repository, as far as its client asks."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[tuple[str, str]] = []  # noqa: RUF012

    def answer(self, status: int, content: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append((self.command, path))
        for name, (status, code) in REFUSED.items():
            if f"{name}/" in f"{path}/":
                return self.answer(status, X_Error_Code=code, X_Error_Message="no")
        if path in ("/api/models/owner/tiny", "/api/models/owner/tiny/revision/main"):
            facts = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            return self.answer(200, json.dumps(facts).encode())
        start = next(
            (one for one in (f"/owner/tiny/resolve/{at}/" for at in ("main", COMMIT)) if path.startswith(one)), ""
        )
        content = self.files.get(path.removeprefix(start)) if start else None
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(200, content, "application/octet-stream", ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch):
    """The address of a hub that has owner/tiny, and no other model."""
    folder = tiny_model("gpt2")
    monkeypatch.setattr(Hub, "files", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    monkeypatch.setattr(Hub, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(commands: list[list[str]], home, endpoint: str, **more: str) -> list[tuple[int, float, str, str]]:
    """(code, seconds, stdout, stderr) of each command, in a process whose hub is at `endpoint`."""
    names = (
        "HF_HUB_OFFLINE",
        "HF_HUB_CACHE",
        "TRANSFORMERS_OFFLINE",
        "HF_TOKEN",
        "http_proxy",
        "HTTP_PROXY",
        "ALL_PROXY",
    )
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def is_one_sentence(said: str) -> bool:
    return said.startswith("luthier: ") and said.count("\n") == 1 and "Traceback" not in said


def test_a_model_of_the_hub_is_loaded_and_then_used_without_it(hub, tmp_path):
    command = [sys.executable, "-m", "luthier", "generate", "owner/tiny", "The quick brown", "--max-tokens", "3"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert first.returncode == 0 and first.stderr == "" and first.stdout.strip()
    loaded = {path.rsplit("/", 1)[1] for method, path in Hub.asked if method == "GET"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= loaded
    here = [["generate", str(tiny_model("gpt2")), "The quick brown", "--max-tokens", "3"]]
    again = [["generate", "owner/tiny", "The quick brown", "--max-tokens", "3"]]
    # The hub is gone: once because nobody may ask it, once because it does not answer.
    for more in ({"HF_HUB_OFFLINE": "1"}, {}):
        found = run(again + (here if more else []), tmp_path, "http://127.0.0.1:9", **more)
        assert all((code, said, wrong) == (0, first.stdout, "") for code, _, said, wrong in found)
    assert sum(one.stat().st_size for one in tmp_path.rglob("*.safetensors")) > 0


RECALL = """
import sys
from luthier.models.lean import import_lean
import_lean()
import luthier.engine.native as native
from luthier.core.events import Events
from luthier.engine.loading import load_stored, settle_model
for _ in range(int(sys.argv[1])):
    model = load_stored("owner/tiny", "int8", Events())
    print(model.packed_only)
    settle_model(model, "int8", Events())
"""


@pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))
def test_a_packed_model_of_the_hub_is_recalled_until_the_hub_has_a_newer_one(hub, tmp_path, monkeypatch):
    decoder_model("llama")
    [folder] = [path for key, path in MADE.items() if key.startswith("llama []")]
    monkeypatch.setattr(Hub, "files", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})

    def recalled(endpoint, times, **more):
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | more
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        environment |= {"LUTHIER_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", RECALL, str(times)], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    (tmp_path / "cache").mkdir()
    for library in ("kernels", "decoder"):
        (tmp_path / "cache" / library_path(library).name).symlink_to(library_path(library))
    assert recalled(hub, 2) == ["False", "True"]
    assert recalled("http://127.0.0.1:9", 1, HF_HUB_OFFLINE="1") == ["True"]
    monkeypatch.setattr(sys.modules[__name__], "COMMIT", "f" * 40)
    assert recalled(hub, 2) == ["False", "True"]


def test_a_hub_that_says_no_is_one_sentence(hub, tmp_path):
    commands = [["generate", name, "text"] for name in REFUSED]
    parts = ("has no model of this name", "it does not exist, or it is gated", "it does not exist, or it is gated")
    for name, part, (code, _, said, wrong) in zip(REFUSED, parts, run(commands, tmp_path, hub)):
        assert code == 2 and said == "" and is_one_sentence(wrong)
        assert name in wrong and part in wrong and hub in wrong
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_hub_that_cannot_be_reached_is_one_sentence_and_soon(tmp_path):
    started = time.monotonic()
    data = ["tune", "--model", "owner/tiny", "--data", "sms_spam"]
    commands = [["generate", "owner/tiny", "text"], [*data, "--set", "data.limit=50"]]
    for code, seconds, said, wrong in run(
        commands, tmp_path, "http://127.0.0.1:9", LUTHIER_RUNS=str(tmp_path / "runs")
    ):
        assert code == 2 and said == "" and seconds < 15
        sentence = wrong.splitlines()[-1]
        assert (
            "the hub at http://127.0.0.1:9 cannot be reached" in sentence and "HF_ENDPOINT names a mirror" in sentence
        )
        assert "Traceback" not in wrong
    assert time.monotonic() - started < 30
    assert not list((tmp_path / "runs").glob("*")), "a run that could not begin leaves nothing"


def test_offline_with_an_empty_cache_is_one_sentence(hub, tmp_path):
    found = run([["generate", "owner/tiny", "text"], ["chat", "owner/tiny"]], tmp_path, hub, HF_HUB_OFFLINE="1")
    for code, _, said, wrong in found:
        assert code == 2 and said == "" and is_one_sentence(wrong)
        assert "not in the local cache, and HF_HUB_OFFLINE forbids asking the hub" in wrong
    assert Hub.asked == []
