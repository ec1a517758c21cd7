"""Fine-tuning jobs: what they may ask for, in process; and from outside, with OpenAI's client against a real server."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from asking import CHAT, LIKED, Asked, lines, until
from luthier.core.errors import RunError
from luthier.faces.server.following import as_table, sentence_in, steps_of
from luthier.faces.server.keys import Key, digest
from luthier.faces.server.processes import born
from luthier.faces.server.store import Store
from running import Running


@pytest.fixture
def ask(tmp_path, monkeypatch):
    asked = Asked(tmp_path, monkeypatch)
    yield asked
    asked.close()


def create(asked, key=None, **body):
    if "training_file" not in body:
        body["training_file"] = asked.upload(lines(CHAT), key=key).json()["id"]
    return asked("POST", "/v1/fine_tuning/jobs", key, json={"model": "mini", **body})


def dpo(**hyper):
    return {"type": "dpo", "dpo": {"hyperparameters": hyper}}


def test_what_a_job_asks_of_tune(ask):
    rows = ask.upload(lines(LIKED)).json()["id"]
    hyper = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5, "beta": 0.2}
    made = create(ask, training_file=rows, validation_file=rows, seed=7, method=dpo(**hyper), suffix="x").json()
    assert made["status"] == "queued" and made["hyperparameters"] == hyper and made["method"] == dpo(**hyper)
    settings = ask.server.parts["store"].get("job", made["id"]).content["settings"]
    path = str(ask.server.parts["store"].path_of(f"{rows}.jsonl"))
    assert settings == {
        "model": "mini", "data": {"train": path, "validation": path}, "seed": 7, "epochs": 2, "batch_size": 4,
        "rate_multiplier": 0.5, "objective": {"kind": "dpo", "beta": 0.2},
    }  # fmt: skip
    old = create(ask, hyperparameters={"n_epochs": 3}).json()
    assert old["method"]["type"] == "supervised" and old["hyperparameters"]["n_epochs"] == 3


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"model": "nope"}, 404, "'nope' is not served here"),
        ({"training_file": "file-x"}, 400, "training_file: there is no file 'file-x'"),
        ({"validation_file": "file-x"}, 400, "validation_file: there is no file"),
        ({"method": dpo()}, 400, "method dpo needs rows of input"),
        ({"method": {"type": "reinforcement"}}, 400, "method.type: is 'reinforcement', expected 'supervised' or 'dpo'"),
        ({"method": {"type": "dpo", "supervised": {}}}, 400, "leave it out"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"beta": 1}}, 400, "hyperparameters.beta: this server does not support"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]},
            400,
            "integrations: 'wandb' is not supported",
        ),
        ({"suffix": "../x"}, 400, "suffix"),
        ({"metadata": {"a": "b" * 513}}, 400, "metadata"),
        ({"luthier": {"model": "x"}}, 400, "luthier.model: the job says this in fields of its own"),
        ({"luthier": {"epochs": 2}, "hyperparameters": {"n_epochs": 2}}, 400, "says the same as n_epochs"),
    ],
)
def test_a_wrong_job_is_refused(ask, body, status, sentence):
    answer = create(ask, **body)
    assert answer.status_code == status and sentence in answer.json()["error"]["message"]
    assert ask("GET", "/v1/fine_tuning/jobs").json()["data"] == []


def test_own_settings_are_checked_by_tune_itself(ask):
    error = create(ask, luthier={"adapter": {"kind": "lora", "rnak": 4}}).json()["error"]
    assert "rnak" in error["message"] and "rank" in error["message"] and error["param"] == "luthier"
    for own, said in (
        ({"max_length": "64"}, "luthier: max_length: is '64', expected a number"),
        ({"adapter": {"kind": "lora", "rank": "4"}}, "luthier: adapter.rank: is '4', expected a number"),
        ({"adapter": {"kind": "lora", "rslora": 1}}, "luthier: adapter.rslora: is 1, expected true or false"),
    ):
        error = create(ask, luthier=own).json()["error"]
        assert (error["message"], error["param"]) == (said, "luthier")


def test_files_of_the_machine_are_not_for_every_key(tmp_path, monkeypatch):
    scopes = {"one": ("tune",), "two": ("tune",)}
    asked = Asked(
        tmp_path, monkeypatch, [Key(name=name, sha256=digest(name), scopes=may) for name, may in scopes.items()]
    )
    assert create(asked, "one", luthier={"template": "/etc/passwd"}).status_code == 403
    assert create(asked, "one", model="run:other").status_code == 404
    id = create(asked, "one").json()["id"]
    assert asked("GET", f"/v1/fine_tuning/jobs/{id}", "two").status_code == 404
    assert asked("POST", f"/v1/fine_tuning/jobs/{id}/cancel", "two").status_code == 404
    mine = asked("GET", f"/v1/fine_tuning/jobs/{id}", "one").json()
    assert create(asked, "two", training_file=mine["training_file"]).status_code == 400
    asked.close()


def test_a_queued_job_turns_as_it_is_told(ask):
    job = create(ask).json()
    at = f"/v1/fine_tuning/jobs/{job['id']}"
    assert ask("POST", f"{at}/resume").status_code == 400
    assert ask("POST", f"{at}/pause").json()["status"] == "paused"
    assert ask("DELETE", f"/v1/files/{job['training_file']}").status_code == 409
    assert ask("POST", f"{at}/resume").json()["status"] == "queued"
    over = ask("POST", f"{at}/cancel").json()
    assert over["status"] == "cancelled" and over["finished_at"] is not None
    assert ask("POST", f"{at}/cancel").status_code == 400
    assert ask("DELETE", f"/v1/files/{job['training_file']}").status_code == 200
    events = ask("GET", f"{at}/events?limit=3").json()
    assert [one["message"] for one in events["data"]] == [
        "The job is cancelled",
        "The job is queued",
        "The job is paused",
    ]
    rest = ask("GET", f"{at}/events?after={events['data'][-1]['id']}").json()
    assert len(rest["data"]) == 1 and events["has_more"] and not rest["has_more"]
    assert ask("GET", f"{at}/checkpoints").json()["data"] == []


def test_a_step_that_was_done_again_counts_as_it_was_the_last_time():
    events = [
        {"event": "step", "time": 0, "step": 1, "loss": 3.0},
        {"event": "step", "time": 1, "step": 2, "loss": 2.5},
        {"event": "step", "time": 2, "step": 2, "loss": 2.0},
        {"event": "validate", "time": 3, "step": 2, "loss": 2.25, "accuracy": 0.5, "best": True},
    ]
    assert as_table(steps_of(events)) == "step,train_loss,valid_loss,valid_accuracy\n1,3,,\n2,2,2.25,0.5\n"


def test_the_sentence_that_a_command_ended_with(tmp_path):
    log = tmp_path / "log"
    assert sentence_in(log) is None
    log.write_text("reading\nluthier: data.jsonl: 2 rows:\n  row 1\n  row 2\n")
    assert sentence_in(log) == "data.jsonl: 2 rows:\n  row 1\n  row 2"
    log.write_text("reading\n")
    assert sentence_in(log) is None


def test_a_process_is_known_by_its_start():
    assert born(os.getpid()) == born(os.getpid()) is not None
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    # It has ended, and nobody has asked how.
    assert born(child) is None
    os.waitpid(child, 0)
    assert born(child) is None


def test_nothing_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "server").write_text("in the way")
    answer = Asked(tmp_path, monkeypatch)("GET", "/v1/files")
    assert answer.status_code == 503 and "set LUTHIER_RUNS" in answer.json()["error"]["message"]


def test_the_server_imports_no_torch():
    # Its engines, tunings and checks of settings are processes of their own.
    what = (
        "luthier.faces.server.app, luthier.faces.server.keeping, luthier.faces.server.serving, luthier.data.preferences"
    )
    code = f"import sys, {what}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_of_a_newer_server_is_left_alone(tmp_path):
    Store(tmp_path).close()
    base = sqlite3.connect(tmp_path / "server.sqlite3")
    base.execute("PRAGMA user_version = 99")
    base.close()
    with pytest.raises(RunError, match="newer"):
        Store(tmp_path)


# From here on against real processes.


def chats(count):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} and {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}."},
            ]
        }
        for i in range(count)
    ]
    return lines(*rows)


def client_of(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def over(client, id):
    def look():
        job = client.fine_tuning.jobs.retrieve(id)
        return job if job.status in ("succeeded", "failed", "cancelled") else None

    return until(look)


def learning(client, id):
    """Once steps are made."""
    return until(lambda: any(one.type == "metrics" for one in client.fine_tuning.jobs.list_events(id, limit=5).data))


def pid_of(runs, id):
    base = sqlite3.connect(f"file:{runs}/server/server.sqlite3?mode=ro", uri=True)
    try:
        content = base.execute("SELECT content FROM things WHERE id = ?", (id,)).fetchone()[0]
    finally:
        base.close()
    return json.loads(content)["pid"]


def say(client, model):
    asked = [{"role": "user", "content": "What is 3 and 3?"}]
    answer = client.chat.completions.create(model=model, messages=asked, max_tokens=8, temperature=0)
    return answer.choices[0].message.content


def test_openai_code_tunes_here(tmp_path):
    running = Running("mini", runs=tmp_path)
    try:
        client = client_of(running)
        file = client.files.create(file=("rows.jsonl", chats(12)), purpose="fine-tune")
        made = client.fine_tuning.jobs.create(
            model="mini",
            training_file=file.id,
            suffix="sums",
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        )
        liked = client.files.create(
            file=("liked.jsonl", lines(*[{**LIKED, "n": i} for i in range(12)])), purpose="fine-tune"
        )
        second = client.fine_tuning.jobs.create(
            model="mini", training_file=liked.id, method=dpo(n_epochs=1, beta=0.3), extra_body={"luthier": {"steps": 2}}
        )
        job = over(client, made.id)
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model == f"ft:mini:sums:{job.id[-8:]}" and job.trained_tokens > 0
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
        assert events[0].message == "The job has successfully completed" and len({one.id for one in events}) == len(
            events
        )
        steps = [one.data["train_loss"] for one in events if one.type == "metrics" and "train_loss" in one.data]
        table = client.files.content(job.result_files[0]).text.splitlines()
        assert table[0] == "step,train_loss,valid_loss" and len(table) == 1 + len(steps) > 2
        (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id).data
        assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
        assert checkpoint.metrics.train_loss == steps[0] and checkpoint.metrics.valid_loss is not None
        answer = say(client, job.fine_tuned_model)
        other = over(client, second.id)
        assert other.status == "succeeded" and other.method.dpo.hyperparameters.beta == 0.3, other.error
        assert [one.id for one in client.fine_tuning.jobs.list(limit=1)] == [second.id, made.id]
    finally:
        assert running.stop() == 0
    running = Running("mini", runs=tmp_path)
    try:
        client = client_of(running)
        states = {one.id: one.state for one in client.models.list()}
        assert states == {"mini": "ready", job.fine_tuned_model: "asleep", other.fine_tuned_model: "asleep"}
        assert say(client, job.fine_tuned_model) == answer
        assert client.models.retrieve(job.fine_tuned_model).state == "ready"
        assert client.models.delete(job.fine_tuned_model).deleted
        with pytest.raises(openai.NotFoundError):
            say(client, job.fine_tuned_model)
    finally:
        assert running.stop() == 0


@pytest.mark.e2e
def test_what_breaks_goes_on_or_says_so(tmp_path):
    """The run is killed, the server is killed while it goes on, the server ends while it goes on, the job is cancelled."""
    running = Running("mini", runs=tmp_path)
    try:
        client = client_of(running)
        file = client.files.create(file=("rows.jsonl", chats(40)), purpose="fine-tune")
        long = {"luthier": {"steps": 4000, "checkpoint_every": 10, "validate_every": 1000}}
        job = client.fine_tuning.jobs.create(model="mini", training_file=file.id, extra_body=long)
        waiting = client.fine_tuning.jobs.create(
            model="mini", training_file=file.id, extra_body={"luthier": {"steps": 2}}
        )
        folder = tmp_path / job.id / "checkpoints"
        until(lambda: any(folder.glob("step-*")))
        first = pid_of(tmp_path, job.id)
        os.kill(first, signal.SIGKILL)
        until(lambda: pid_of(tmp_path, job.id) != first)
        second = pid_of(tmp_path, job.id)
        until(
            lambda: (
                "goes on from its newest checkpoint" in str(client.fine_tuning.jobs.list_events(job.id, limit=100).data)
            )
        )
        learning(client, job.id)
        running.process.kill()
        running.process.communicate()
    except BaseException:
        running.stop()
        raise
    assert born(second) is not None
    running = Running("mini", runs=tmp_path)
    try:
        client = client_of(running)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
        assert client.fine_tuning.jobs.retrieve(waiting.id).status == "queued"
        learning(client, job.id)
        assert pid_of(tmp_path, job.id) == second and born(second) is not None
    finally:
        assert running.stop() == 0
    until(lambda: born(second) is None)
    assert json.loads(Path(tmp_path, job.id, "record.json").read_text())["state"] == "interrupted"
    running = Running("mini", runs=tmp_path)
    try:
        client = client_of(running)
        until(lambda: pid_of(tmp_path, job.id) != second)
        learning(client, job.id)
        assert client.fine_tuning.jobs.pause(job.id).status == "paused"
        assert over(client, waiting.id).status == "succeeded"
        third = pid_of(tmp_path, job.id)
        assert born(third) is None
        client.fine_tuning.jobs.resume(job.id)
        until(lambda: pid_of(tmp_path, job.id) != third)
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        until(lambda: born(pid_of(tmp_path, job.id)) is None)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.create(model="nope", training_file=file.id)
        long = {"luthier": {"max_length": 2}}
        refused = over(client, client.fine_tuning.jobs.create(model="mini", training_file=file.id, extra_body=long).id)
        assert refused.status == "failed" and "max_length" in refused.error.message
    finally:
        assert running.stop() == 0
