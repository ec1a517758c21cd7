"""Answers from indexes: the official client against a real server that has them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from luthier.core.config import resolve
from luthier.core.errors import ConfigError
from luthier.core.types import Message
from luthier.engine.generate import generate
from luthier.engine.sampling import Sampling
from luthier.faces.cli.main import main
from luthier.faces.server.keys import add_key
from luthier.faces.server.settings import Serve
from luthier.models.load import load_model
from luthier.retrieval.answer import retrieve
from luthier.retrieval.prompt import build_prompt
from luthier.retrieval.search import open_index
from luthier.verbs.grounding import Grounded
from luthier.verbs.index import index
from luthier.verbs.tune import tune
from running import Running

DOCS = {
    "shop.md": "# Shop\n\n## Returns\nGoods can be returned within thirty days. Keep the receipt.\n\n## Hours\nWe open at 9.\n",
    "bows.md": "# Bows\n\nRepairing a bow takes about a week. New hair costs forty euros.\n",
    "strings.md": "# Strings\n\nViolins are tuned in fifths. A string lasts half a year.\n",
}
ASKED, UNKNOWN = "Can goods be returned?", "Who won the cup final?"
# What the model learns to say, and what is left of it.
SAID = "Within thirty days [1]. Some [9] say so [1, 7]."
KEPT = "Within thirty days [1]. Some say so [1]."
SEARCH = {"type": "file_search", "vector_store_ids": ["help"]}
FUNCTION = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
ASK = {"model": "run:shop", "input": ASKED, "temperature": 0, "max_output_tokens": 60, "tools": [SEARCH]}
CHAT = {
    "model": "run:shop", "messages": [{"role": "user", "content": ASKED}], "temperature": 0, "max_tokens": 60,
    "extra_body": {"index": "help"},
}  # fmt: skip


def write_docs(folder, texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of runs with two indexes, and a model that was tuned on one answer from the first."""
    folder = tmp_path_factory.mktemp("searched")
    rows = [{"question": one, "answerable": known} for one, known in ((ASKED, True), ("How tall is it?", False))]
    (folder / "asked.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, rows[1] | {"question": UNKNOWN}])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUNS", str(folder / "runs"))
        index(
            docs=(write_docs(folder / "docs", DOCS),),
            name="help",
            encoder="none",
            questions=str(folder / "asked.jsonl"),
        )
        long = {
            f"{at}.md": f"Goods {at}. " + "Goods of every kind are kept in the store for a while. " * 9
            for at in range(3)
        }
        index(docs=(write_docs(folder / "long", long),), name="store", encoder="none")
        found = retrieve(open_index("help"), ASKED)
        turns = [("user", build_prompt(ASKED, found.sources)), ("assistant", SAID)]
        row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
        tune(
            model="mini", data=str(folder / "rows.jsonl"), steps=40, batch_size=1, learning_rate=3e-3, name="shop",
            baselines=False,
        )  # fmt: skip
    return folder


@pytest.fixture
def runs(place, monkeypatch):
    """Where the runs of these tests lie."""
    monkeypatch.setenv("LUTHIER_RUNS", str(place / "runs"))
    return place / "runs"


@pytest.fixture(scope="module")
def searched(place):
    """A server of them, and a key for it."""
    key = add_key(place / "keys.json", "app", ["infer", "metrics"])
    running = Running(
        "run:shop", "--indexes", "help, long=run:store", "--keys", str(place / "keys.json"), runs=place / "runs"
    )
    yield running, key
    assert running.stop() == 0


@pytest.fixture
def client(searched):
    running, key = searched
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)


def plain(annotations):
    return [one.model_dump() for one in annotations]


def test_an_answer_is_that_of_chat_with_an_index(client, runs):
    found = client.responses.create(**ASK)
    call, message = found.output
    grounded, model = Grounded("help", 5), load_model("run:shop", as_stored=True)
    turns = (Message("user", ASKED),)
    asked, sources = grounded.ask(model, turns, grounded.look_up([turns])[0], 60)
    written = generate(model, [asked], Sampling(max_tokens=60))[0]
    own = grounded.finish(written.text, sources)
    assert found.output_text == own.text == KEPT and found.usage.input_tokens == written.prompt_tokens
    assert (call.type, call.queries, call.status, call.results) == ("file_search_call", [ASKED], "completed", None)
    (content,) = message.content
    assert content.removed_citations == own.removed == 2
    assert [KEPT[one.index : one.index + 3] for one in content.annotations] == ["[1]", "[1]"]
    one = content.annotations[0]
    assert (one.type, one.file_id, one.filename, one.lines) == ("file_citation", "shop.md", "shop.md", [4, 4])
    assert one.quote == sources[0].passage.shown and one.vector_store_id == "help" and one.number == 1


def test_a_stream_tells_of_the_search_and_of_citations(client):
    whole = client.responses.create(**ASK, include=["file_search_call.results"])
    with client.responses.stream(**ASK, include=["file_search_call.results"]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [one.type.removeprefix("response.") for one in events]
    steps = [f"file_search_call.{step}" for step in ("in_progress", "searching", "completed")]
    assert kinds[:7] == ["created", "in_progress", "output_item.added", *steps, "output_item.done"]
    assert kinds[7] == "output_item.added" and kinds[-1] == "completed"
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == whole.output_text == KEPT
    added = [one for one in events if one.type == "response.output_text.annotation.added"]
    assert [one.annotation_index for one in added] == [0, 1] and {one.output_index for one in added} == {1}
    content, other = final.output[1].content[0], whole.output[1].content[0]
    assert plain(one.annotation for one in added) == plain(content.annotations) == plain(other.annotations)
    assert content.removed_citations == 2 and final.output[0].results == whole.output[0].results
    (hit,) = whole.output[0].results
    assert hit.filename == "shop.md" and hit.score == 1 and "thirty days" in hit.text and hit.attributes["bm25"] > 0


def test_what_an_index_does_not_hold_is_not_answered(client, searched):
    found = client.responses.create(**ASK | {"input": UNKNOWN}, include=["file_search_call.results"])
    assert found.output_text == "I do not know." and found.usage.total_tokens == 0 and not found.output[0].known
    with client.responses.stream(**ASK | {"input": "谁赢了决赛？"}) as stream:
        kinds = [one.type for one in stream]
        assert stream.get_final_response().output_text == "我不知道。"
    assert "response.file_search_call.completed" in kinds
    asked = CHAT | {"messages": [{"role": "user", "content": UNKNOWN}], "n": 2, "temperature": 1}
    for choice in client.chat.completions.create(**asked).choices:
        assert (
            choice.message.content == "I do not know." and not choice.message.known and choice.finish_reason == "stop"
        )
    # Where no index is to be searched the model is asked.
    assert client.responses.create(**ASK | {"input": UNKNOWN, "tool_choice": "none"}).usage.output_tokens > 0


def test_answers_are_sent_back(client):
    answer = client.responses.create(**ASK, include=["file_search_call.results"])
    before = [{"role": "user", "content": ASKED}, *(one.model_dump(exclude_none=True) for one in answer.output)]
    found = client.responses.create(**ASK | {"input": [*before, {"role": "user", "content": UNKNOWN}]})
    assert found.output_text == "I do not know." and found.output[0].queries == [UNKNOWN]
    message = client.chat.completions.create(**CHAT).choices[0].message
    turns = [*CHAT["messages"], message, {"role": "user", "content": ASKED}]
    again = client.chat.completions.create(**CHAT | {"messages": turns})
    assert again.choices[0].message.known and again.usage.prompt_tokens > 100
    with pytest.raises(openai.BadRequestError, match="last turn is the user's"):
        client.responses.create(**ASK | {"input": before})


def test_a_chat_names_an_index(client, searched):
    running, key = searched
    message = client.chat.completions.create(**CHAT).choices[0].message
    assert message.content == KEPT and message.known and message.removed_citations == 2
    assert [KEPT[one["start"] : one["end"]] for one in message.citations] == ["[1]", "[1]"]
    with client.chat.completions.stream(**CHAT | {"n": 2, "temperature": 0.1}) as stream:
        for _ in stream:
            pass
        streamed = [one.message for one in stream.get_final_completion().choices]
    for one in streamed:
        assert (one.content, one.citations, one.known) == (KEPT, message.citations, True)
    body = {name: value for name, value in CHAT.items() if name != "extra_body"} | {"index": "help"}
    read = httpx.post(
        f"{running.url}/v1/chat/completions/render", json=body, headers={"Authorization": f"Bearer {key}"}
    ).json()
    assert "[1] shop.md › Shop › Returns\nGoods can be returned" in read["prompt"]


def test_passages_without_room_are_left_out(client):
    asked = {**ASK, "input": "Which goods are kept?", "include": ["file_search_call.results"]}
    found = client.responses.create(
        **asked | {"tools": [SEARCH | {"vector_store_ids": ["long"]}], "max_output_tokens": 150}
    )
    call = found.output[0]
    assert 0 < call.read < len(call.results) == 3 and found.usage.input_tokens <= 512 - 150
    with pytest.raises(openai.BadRequestError, match="not one passage fits"):
        client.responses.create(
            **asked | {"tools": [SEARCH | {"vector_store_ids": ["long"]}], "max_output_tokens": 450}
        )


def test_several_indexes_are_searched_as_one(client):
    tools = [SEARCH | {"vector_store_ids": ["long", "help", "long"], "max_num_results": 3}]
    asked = {**ASK, "tools": tools, "include": ["file_search_call.results"]}
    hits = client.responses.create(**asked | {"input": "Are goods returned?", "max_output_tokens": 5}).output[0].results
    assert {one.attributes["vector_store_id"] for one in hits} == {"long", "help"} and len(hits) == 3
    assert [one.score for one in hits] == sorted((one.score for one in hits), reverse=True)


def test_vector_stores_are_read_and_searched(client, searched):
    running, _ = searched
    assert [one.id for one in client.vector_stores.list()] == ["help", "long"]
    store = client.vector_stores.retrieve("help")
    assert (store.name, store.status, store.file_counts.completed, store.passages) == ("help", "completed", 3, 4)
    found = client.vector_stores.search("help", query="How long does repairing a bow take?", max_num_results=1)
    (hit,) = found.data
    assert hit.filename == hit.file_id == "bows.md" and "about a week" in hit.content[0].text and hit.score == 1
    both = client.vector_stores.search("help", query=["goods returned", "bow repairing"], max_num_results=2).data
    assert {one.filename for one in both} == {"shop.md", "bows.md"}
    with pytest.raises(openai.APIStatusError, match="`luthier index DOCS --name NAME` makes") as caught:
        client.vector_stores.create(name="new")
    assert caught.value.status_code == 405
    with pytest.raises(openai.NotFoundError, match="did you mean 'help'"):
        client.vector_stores.search("hlp", query="goods")
    assert httpx.get(f"{running.url}/v1/vector_stores").status_code == 401


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tools": [SEARCH, FUNCTION]}, "file_search and functions do not go together"),
        ({"tools": [SEARCH, SEARCH]}, "the vector_store_ids of one file_search"),
        ({"tools": [SEARCH | {"filters": {}}]}, "filters: this server does not support"),
        ({"tools": [SEARCH | {"max_num_results": 51}]}, "max_num_results"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "file_search"}}, "file_search is not among the tools"),
        ({"text": {"format": {"type": "json_object"}}}, "leave text.format or file_search out"),
        ({"include": ["web_search_call.results"]}, "include"),
        ({"input": ""}, "the question is empty"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused(client, changed, said):
    with pytest.raises(openai.BadRequestError, match=said):
        client.responses.create(**ASK | changed)


@pytest.mark.parametrize("name", ["tools", "logprobs", "response_format"])
def test_what_does_not_go_with_an_index_is_refused(client, name):
    given = {
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "logprobs": True,
        "response_format": {"type": "json_object"},
    }
    with pytest.raises(openai.BadRequestError, match="text with citations"):
        client.chat.completions.create(**CHAT, **{name: given[name]})


def test_an_index_that_is_not_served_is_named(client):
    with pytest.raises(openai.NotFoundError, match="the index 'faq' is not served here; choose from: help, long"):
        client.responses.create(**ASK | {"tools": [SEARCH | {"vector_store_ids": ["help", "faq"]}]})
    with pytest.raises(openai.NotFoundError, match="did you mean 'help'"):
        client.chat.completions.create(**CHAT | {"extra_body": {"index": "halp"}}, stream=True)


def test_searches_are_counted(client, searched):
    running, key = searched

    def read(name):
        lines = httpx.get(f"{running.url}/metrics", headers={"Authorization": f"Bearer {key}"}).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = ['luthier_searches_total{index="help",known="yes"}', 'luthier_searches_total{index="help",known="no"}',
             'luthier_search_seconds_count{index="help"}', 'luthier_removed_citations_total{model="run:shop"}']  # fmt: skip
    before = [read(one) for one in names]
    client.responses.create(**ASK)
    client.responses.create(**ASK | {"input": UNKNOWN})
    assert [read(one) for one in names] == [before[0] + 1, before[1] + 1, before[2] + 2, before[3] + 2]
    assert read("luthier_index_up") == 1


def test_an_index_that_was_updated_is_read_anew(client, place, runs):
    query = "Which rosin suits?"
    assert "rosin.md" not in [one.filename for one in client.vector_stores.search("help", query=query)]
    write_docs(place / "docs", {"rosin.md": "# Rosin\n\nDark rosin suits the cello.\n"})
    index(docs=(str(place / "docs"),), name="help", encoder="none", questions=str(place / "asked.jsonl"))
    assert client.vector_stores.search("help", query=query).data[0].filename == "rosin.md"
    assert client.vector_stores.retrieve("help").file_counts.total == 4


def test_a_process_that_is_killed_comes_back(client, searched):
    running, _ = searched
    pid = running.process.pid
    # The first that was started.
    first = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[0]
    os.kill(int(first), signal.SIGKILL)
    with pytest.raises(openai.InternalServerError, match=r"ended|started again"):
        for _ in range(100):
            client.vector_stores.search("help", query="goods")
    assert client.responses.create(**ASK | {"tools": []}).usage.output_tokens
    end = time.monotonic() + 60
    while True:
        try:
            assert client.responses.create(**ASK).output_text == KEPT
            return
        except openai.InternalServerError:
            assert time.monotonic() < end
            threading.Event().wait(0.2)


def test_a_wrong_index_ends_the_start(runs, capsys):
    assert main(["serve", "run:shop", "--indexes", "help,hlp", "--port", "0"]) == 2
    assert "run:hlp: no such run" in capsys.readouterr().err
    assert main(["serve", "run:shop", "--indexes", "help,other=run:shop", "--port", "0"]) == 2
    assert "this run holds no index" in capsys.readouterr().err


def test_addresses_need_no_torch():
    code = "import sys, luthier.faces.server.app, luthier.faces.server.serving; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


@pytest.mark.parametrize(
    ("names", "said"),
    [("help,faq,help", "two indexes are named help"), ("./runs/help", "taken apart; write NAME=./runs/help")],
)
def test_names_of_indexes_tell_them_apart(names, said):
    with pytest.raises(ConfigError, match=said):
        resolve(Serve, values={"indexes": names})
