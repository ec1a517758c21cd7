"""Batches: what is refused, in process; and answers, errors, a cancel and a restart against real servers."""

import json

import httpx
import openai
import pytest

from asking import ASKED, CHAT, Asked, lines, until
from luthier.faces.server.batching import Answers
from running import Running


@pytest.fixture
def ask(tmp_path, monkeypatch):
    asked = Asked(tmp_path, monkeypatch)
    yield asked
    asked.close()


def requests(count, **body):
    asked = {"model": "mini", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 4, "temperature": 0}
    return [{**ASKED, "custom_id": f"row {i}", "body": {**asked, **body}} for i in range(count)]


def create(ask, file, **body):
    wanted = {"input_file_id": file, "endpoint": ASKED["url"], "completion_window": "24h", **body}
    return ask("POST", "/v1/batches", json=wanted)


def test_a_batch_is_kept_listed_and_cancelled(ask):
    file = ask.upload(lines(*requests(3)), "batch").json()["id"]
    made = [create(ask, file, metadata={"n": str(i)}).json() for i in range(3)]
    assert made[0]["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    assert made[0]["expires_at"] - made[0]["created_at"] == 24 * 3600 and made[0]["metadata"] == {"n": "0"}
    first = ask("GET", "/v1/batches?limit=2").json()
    assert [one["id"] for one in first["data"]] == [made[2]["id"], made[1]["id"]] and first["has_more"]
    assert len(ask("GET", f"/v1/batches?after={first['last_id']}").json()["data"]) == 1
    assert ask("DELETE", f"/v1/files/{file}").status_code == 409
    at = f"/v1/batches/{made[0]['id']}"
    assert ask("POST", f"{at}/cancel").json()["status"] == "cancelling"
    assert ask("POST", f"{at}/cancel").status_code == 400 and ask("GET", at).json()["status"] == "cancelling"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"endpoint": "/v1/completions"}, "are for '/v1/chat/completions'"),
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-x"}, "input_file_id: there is no file"),
    ],
)
def test_a_wrong_batch_is_refused(ask, body, sentence):
    file = ask.upload(lines(ASKED), "batch").json()["id"]
    answer = create(ask, file, **body)
    assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]
    other = create(ask, ask.upload(lines(CHAT)).json()["id"]).json()["error"]
    assert "was uploaded for 'fine-tune'" in other["message"]


def test_answers_of_an_earlier_server_count_and_half_a_line_does_not(tmp_path):
    answers = Answers(tmp_path, "batch-x")
    answers.add("a", 200, {"text": "é"})
    answers.add("b", 404, {"error": {}})
    answers.close()
    with open(answers.good, "ab") as file:
        file.write(b'{"custom_id": "c", "resp')
    again = Answers(tmp_path, "batch-x")
    assert again.done == {"a", "b"} and again.counts == (1, 1)
    again.add("c", 200, {})
    again.expire("d")
    again.close()
    assert [json.loads(line)["custom_id"] for line in again.good.read_bytes().splitlines()] == ["a", "c"]
    expired = json.loads(again.bad.read_bytes().splitlines()[1])
    assert expired["response"] is None and expired["error"]["code"] == "batch_expired"


@pytest.fixture
def client_of():
    """Clients of servers, all of which are closed."""
    made = []

    def make(running):
        made.append(openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0))
        return made[-1]

    yield make
    for one in made:
        one.close()


def over(client, id):
    def look():
        batch = client.batches.retrieve(id)
        return batch if batch.status in ("completed", "failed", "cancelled", "expired") else None

    return until(look)


def begin(client, rows, endpoint="/v1/chat/completions"):
    file = client.files.create(file=("rows.jsonl", lines(*rows)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def read(client, file):
    return {row["custom_id"]: row for row in map(json.loads, client.files.content(file).text.splitlines())}


def test_a_batch_answers_as_the_address_does(served, client_of):
    client = client_of(served)
    rows = requests(20)
    rows[3]["body"]["model"] = "nope"
    rows[4]["body"]["temprature"] = 1
    rows[5]["body"]["priority"] = "high"
    rows[6]["body"]["priority"] = True
    rows[7]["body"]["max_tokens"] = "4"
    rows[8]["body"]["priority"] = None
    batch = over(client, begin(client, rows).id)
    assert batch.status == "completed", batch.errors
    assert batch.request_counts.to_dict() == {"total": 20, "completed": 15, "failed": 5}
    good, bad = read(client, batch.output_file_id), read(client, batch.error_file_id)
    alone = client.chat.completions.create(**rows[0]["body"])
    texts = {row["response"]["body"]["choices"][0]["message"]["content"] for row in good.values()}
    assert len(good) == 15 and texts == {alone.choices[0].message.content}
    statuses = {id: row["response"]["status_code"] for id, row in bad.items()}
    assert statuses == {"row 3": 404, "row 4": 400, "row 5": 400, "row 6": 400, "row 7": 400}
    said = bad["row 7"]["response"]["body"]["error"]["message"]
    assert said == "max_tokens: is '4', expected an integer"
    assert "temprature" in bad["row 4"]["response"]["body"]["error"]["message"]
    plain = [{**ASKED, "url": "/v1/completions", "body": {"model": "mini", "prompt": "Once", "max_tokens": 3}}]
    assert over(client, begin(client, plain, "/v1/completions").id).request_counts.completed == 1
    vectors = [{**ASKED, "url": "/v1/embeddings", "body": {"model": "mini", "input": "Once", "dimensions": 9999}}]
    batch = over(client, begin(client, vectors, "/v1/embeddings").id)
    # Vectors of this model are shorter, which is said there and here alike.
    alone = httpx.post(f"{served.url}/v1/embeddings", json=vectors[0]["body"])
    (row,) = read(client, batch.error_file_id).values()
    assert row["response"]["body"] == alone.json() and row["response"]["status_code"] == alone.status_code == 400


def test_a_batch_survives_its_server_and_ends_when_it_is_told(tmp_path, client_of):
    running = Running("mini", runs=tmp_path)
    try:
        client = client_of(running)
        batch = begin(client, requests(400, max_tokens=60, ignore_eos=True))
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 20)
        running.process.kill()
        running.process.communicate()
    except BaseException:
        running.stop()
        raise
    folder = tmp_path / "server" / "batches"
    before = (folder / f"{batch.id}.output.jsonl").read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert before.count(b"\n") >= 20
    running = Running("mini", runs=tmp_path)
    try:
        client = client_of(running)
        done = before.count(b"\n")
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed > done)
        client.batches.cancel(batch.id)
        ended = over(client, batch.id)
        assert ended.status == "cancelled" and done < ended.request_counts.completed < 400
        content = client.files.content(ended.output_file_id).read()
        # What was answered before is there as it was, once.
        assert content.startswith(before) and len(read(client, ended.output_file_id)) == content.count(b"\n")
        assert list(folder.iterdir()) == []
    finally:
        assert running.stop() == 0
