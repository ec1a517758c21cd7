"""Two servers on one runs directory: one holds the queue, the other says so, serves its models, and takes over."""

import json
import threading
import time
from contextlib import ExitStack

import httpx
import openai
import pytest

from asking import CHAT, lines
from luthier.faces.server.store import Store, Turned
from running import Running

ROW = {"method": "POST", "url": "/v1/chat/completions"}
BODY = {
    "model": "mini",
    "messages": [{"role": "user", "content": "Once"}],
    "max_tokens": 20,
    "temperature": 0,
    "ignore_eos": True,
}


def client_of(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def upload(client, count):
    rows = "".join(json.dumps({**ROW, "custom_id": f"row {at}", "body": BODY}) + "\n" for at in range(count))
    return client.files.create(file=("rows.jsonl", rows.encode()), purpose="batch").id


def make(client, file):
    return client.batches.create(input_file_id=file, endpoint=ROW["url"], completion_window="24h").id


def until(check, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end
        threading.Event().wait(0.05)
    return found


def ended(client, id):
    found = client.batches.retrieve(id)
    return found if found.status in ("completed", "failed", "cancelled", "expired") else None


def made_at(client, file):
    """A batch, once it is taken."""
    try:
        return make(client, file)
    except openai.InternalServerError:
        return None


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two servers of one directory, in the order in which they began, and a client of each."""
    runs = tmp_path_factory.mktemp("runs")
    with ExitStack() as open_ones:
        running = []
        for _ in range(2):
            running.append(Running("mini", "--execution", "model", runs=runs))
            open_ones.callback(end, running[-1])
        yield running, [open_ones.enter_context(client_of(one)) for one in running]


def end(running):
    if running.process.poll() is None:
        assert running.stop() == 0


def test_what_one_tunes_the_other_serves_without_a_restart(both):
    (first, second), (one, other) = both
    file = one.files.create(file=("rows.jsonl", lines(*[CHAT] * 4)), purpose="fine-tune").id
    job = one.fine_tuning.jobs.create(
        model="mini", training_file=file, hyperparameters={"n_epochs": 1, "batch_size": 2}
    ).id
    name = until(lambda: one.fine_tuning.jobs.retrieve(job).fine_tuned_model, 300)
    assert name.startswith("ft:mini:")
    until(lambda: name in [model.id for model in other.models.list()])
    said = [
        httpx.post(f"{running.url}/v1/chat/completions", json=BODY | {"model": name}, timeout=120).json()
        for running in (first, second)
    ]
    assert said[0]["choices"] == said[1]["choices"]
    # What is deleted at one is gone at the other, and what is unloaded at one comes not back there.
    assert httpx.delete(f"{second.url}/admin/models/{name}", timeout=60).status_code == 200
    upload(one, 1)
    threading.Event().wait(5)
    assert name not in [model.id for model in other.models.list()]
    assert name in [model.id for model in one.models.list()]
    assert other.models.delete(name).deleted
    until(lambda: name not in [model.id for model in one.models.list()])


def test_one_holds_the_queue_and_the_other_takes_over_when_it_ends(both):
    (first, second), (one, other) = both
    assert any(
        "holds the queue: no fine-tuning jobs and batches are taken here" in line for line in second.process.stderr
    )
    file = upload(other, 30)
    for ask in (
        lambda: make(other, file),
        lambda: other.fine_tuning.jobs.create(model="mini", training_file=file),
    ):
        with pytest.raises(
            openai.InternalServerError, match="holds the queue of jobs and batches; ask that one"
        ) as refused:
            ask()
        assert refused.value.status_code == 503
    assert httpx.post(f"{second.url}/v1/chat/completions", json=BODY).status_code == 200
    batch = make(one, file)
    done = until(lambda: ended(other, batch))
    assert done.status == "completed" and done.request_counts.completed == 30
    ids = [json.loads(line)["custom_id"] for line in other.files.content(done.output_file_id).text.splitlines()]
    assert sorted(ids) == sorted(f"row {at}" for at in range(30))
    # What is cancelled at one ends at the other.
    long = make(one, upload(one, 5000))
    until(lambda: one.batches.retrieve(long).request_counts.completed > 0)
    assert other.batches.cancel(long).status == "cancelling"
    assert until(lambda: ended(one, long)).status == "cancelled"
    assert first.stop() == 0
    again = until(lambda: made_at(other, file))
    assert until(lambda: ended(other, again)).request_counts.completed == 30


def test_two_stores_lose_nothing_of_one_another(tmp_path):
    first = Store(tmp_path)
    first.put("job", "job", "me", {"status": "queued"})
    lost = []

    def count(name):
        store = Store(tmp_path)
        for at in range(300):
            if at and store.get("job", "job").content[name] != at - 1:
                lost.append((name, at))
            store.change("job", "job", **{name: at})
        store.close()

    threads = [threading.Thread(target=count, args=(name,)) for name in ("one", "other")]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not lost and first.get("job", "job").content == {"status": "queued", "one": 299, "other": 299}
    with pytest.raises(Turned, match="is queued by now"):
        first.change("job", "job", was=("running",), status="succeeded")
    first.change("job", "job", was=("queued",), status="cancelled")
    first.close()
