"""Where models come from, and what is said when they do not."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from luthier.core.errors import ModelError
from luthier.core.events import Events
from luthier.engine.loading import load_stored
from luthier.models.load import load_model
from luthier.models.sources import lasting_name, resolve_source, settle, shipped_models
from tiny import tiny_model


def test_directory_and_hub_id():
    path = tiny_model("llama")
    assert resolve_source(str(path)) == path
    assert resolve_source("owner/some-model_1.0") == "owner/some-model_1.0"


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "two words", "a/b/c"])
def test_no_such_directory(source):
    with pytest.raises(ModelError, match="no such directory; give a directory, run:<id>, a hub id"):
        resolve_source(source)


def test_a_file_is_no_model():
    with pytest.raises(ModelError, match="this is a file; a model is the directory"):
        resolve_source(str(tiny_model("llama") / "config.json"))


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json here"):
        load_model(str(tmp_path))


def test_run_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path))
    with pytest.raises(ModelError, match="run:nope: no such run"):
        resolve_source("run:nope")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "record.json").write_text('{"id": "one", "verb": "evaluate"}')
    with pytest.raises(ModelError, match="the run holds no model"):
        resolve_source("run:one")
    (tmp_path / "one" / "artefacts" / "model").mkdir(parents=True)
    assert resolve_source("run:one") == tmp_path / "one" / "artefacts" / "model"


def test_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"the hub at http://127\.0\.0\.1:9 cannot be reached") as caught:
        load_model("owner/unknown-model")
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "status, code, sentence",
    [
        (503, None, r"cannot be reached \(status 503\)"),
        (401, "GatedRepo", "it does not exist, or it is gated"),
        (404, "RepoNotFound", "has no model of this name"),
    ],
)
def test_hub_that_says_no(status, code, sentence, monkeypatch):
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *_):
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(ModelError, match=sentence):
            load_model("owner/unknown-model")
        server.shutdown()


def test_hub_that_may_not_be_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not in the local cache, and HF_HUB_OFFLINE forbids asking the hub"):
        load_model("owner/unknown-model")


def test_lasting_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert lasting_name("model") == str(tmp_path / "model")
    assert lasting_name("run:x") == "run:x"
    assert lasting_name("owner/name") == "owner/name"
    assert all(lasting_name(name) == name for name in shipped_models())


@pytest.mark.parametrize("source", ["º", "y" * 97, "a--b", "a."])
def test_what_the_hub_takes_for_no_name_is_no_model(source):
    with pytest.raises(ModelError, match="no such directory; give a directory, run:<id>, a hub id"):
        load_model(source)
    # Nor is it looked for among models that were packed before.
    with pytest.raises(ModelError, match="no such directory; give a directory, run:<id>, a hub id"):
        load_stored(source, "auto", Events())


@pytest.mark.parametrize("source", ["a model " * 50, "run:" + "y" * 300, "~nobody-of-this-name/model"])
def test_what_can_be_no_path_is_no_model(source):
    with pytest.raises(ModelError, match=r"no such (directory|run)"):
        resolve_source(source)


def test_the_last_run_is_the_newest_that_holds_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path))
    with pytest.raises(ModelError, match="no runs yet"):
        resolve_source("run:last")
    for at, (name, verb) in enumerate((("old", "tune"), ("new", "tune"), ("judged", "evaluate"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(
            f'{{"id": "{name}", "verb": "{verb}", "created": "2026-01-0{at + 1}"}}'
        )
    with pytest.raises(ModelError, match="none of the runs holds what is asked for"):
        resolve_source("run:last")
    for name in ("old", "new"):
        (tmp_path / name / "artefacts" / "model").mkdir(parents=True)
    assert resolve_source("run:last") == tmp_path / "new" / "artefacts" / "model"
    assert settle("run:last") == "run:new" and settle("run:old") == "run:old" and settle("mini") == "mini"
