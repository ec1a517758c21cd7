"""Files of a server, asked in process: what is taken, what is refused and how, lists, owners."""

import resource
import sqlite3

import pytest

from asking import ASKED, CHAT, LIKED, Asked, lines
from luthier.faces.server.keys import Key, digest
from luthier.faces.server.refusals import Refusal
from luthier.faces.server.rows import read_lines
from luthier.faces.server.store import Store


@pytest.fixture
def ask(tmp_path, monkeypatch):
    asked = Asked(tmp_path, monkeypatch)
    yield asked
    asked.close()


def kept(folder):
    return sorted(path.name for path in (folder / "server" / "files").iterdir())


@pytest.mark.parametrize(
    ("content", "purpose"),
    [
        (lines(CHAT), "fine-tune"),
        (lines(LIKED), "fine-tune"),
        (lines({"prompt": "Hi", "completion": "Hello"}), "fine-tune"),
        (lines(ASKED), "batch"),
    ],
)
def test_a_file_comes_back_as_it_was(ask, tmp_path, content, purpose):
    made = ask.upload(content, purpose).json()
    assert made["bytes"] == len(content) and made["rows"] == 1 and made["purpose"] == purpose
    assert ask("GET", f"/v1/files/{made['id']}").json() == made
    assert ask("GET", f"/v1/files/{made['id']}/content").content == content
    assert ask("DELETE", f"/v1/files/{made['id']}").json() == {"id": made["id"], "object": "file", "deleted": True}
    assert ask("GET", f"/v1/files/{made['id']}").status_code == 404 and kept(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "purpose", "sentence"),
    [
        (b"", "fine-tune", "there is no row"),
        (b"\n\n", "fine-tune", "there is no row"),
        (lines(CHAT) + b"{\n", "fine-tune", "line 2: not valid JSON"),
        (lines(CHAT) + b'{"messages": "caf\xe9"}\n', "fine-tune", "line 2: not UTF-8 (byte 18 is 0xe9)"),
        (lines(CHAT, [1]), "fine-tune", "line 2: holds a list, expected an object"),
        (lines({"messages": [{"role": "usr", "content": "a"}]}), "fine-tune", "line 1: turn 1 has the role 'usr'"),
        (lines({"messages": CHAT["messages"][:1]}), "fine-tune", "line 1: 'messages' holds no turn of the assistant"),
        (lines(CHAT, {"messages": [{"role": "user"}]}), "fine-tune", "line 2: turn 1 has no content"),
        (lines({**CHAT, "tools": "x"}), "fine-tune", "line 1: the tools are no JSON"),
        (lines({**LIKED, "non_preferred_output": LIKED["preferred_output"]}), "fine-tune", "are the same"),
        (lines(CHAT, LIKED), "fine-tune", "line 2: the column 'messages' is missing"),
        (lines(ASKED, ASKED), "batch", "line 2: custom_id: 'one' is that of line 1 too"),
        (lines({**ASKED, "method": "GET"}), "batch", "line 1: method: is 'GET', expected 'POST'"),
        (lines({**ASKED, "url": "/v1/models"}), "batch", "line 1: url: is '/v1/models'"),
        (lines({**ASKED, "body": {}}), "batch", "line 1: body.model: is required"),
        (lines({**ASKED, "body": {"model": "mini", "stream": True}}), "batch", "line 1: body.stream"),
        (lines(ASKED, {**ASKED, "custom_id": "two", "url": "/v1/completions"}), "batch", "line 2: url: is"),
        (lines(CHAT), "assistants", "purpose: is 'assistants'"),
    ],
)
def test_a_wrong_file_is_refused_and_not_kept(ask, tmp_path, content, purpose, sentence):
    answer = ask.upload(content, purpose)
    assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]
    assert kept(tmp_path) == []


@pytest.mark.parametrize(("row", "purpose"), [(CHAT, "fine-tune"), (LIKED, "fine-tune"), (ASKED, "batch")])
def test_a_byte_order_mark_is_no_part_of_the_rows(ask, tmp_path, row, purpose):
    content = b"\xef\xbb\xbf" + lines(row)
    made = ask.upload(content, purpose).json()
    assert made["rows"] == 1 and ask("GET", f"/v1/files/{made['id']}/content").content == content
    (stored,) = kept(tmp_path)
    assert list(read_lines(tmp_path / "server" / "files" / stored)) == [(1, row)]
    # Places are those of the file without it, and elsewhere it is a mistake.
    for wrong, where in ((b"{\n", "line 1: "), (lines(row) + b"{\n", "line 2: "), (b"\n{\n", "line 2: ")):
        said = ask.upload(b"\xef\xbb\xbf" + wrong, purpose).json()["error"]["message"]
        assert where in said and said == ask.upload(wrong, purpose).json()["error"]["message"]
    assert "line 2: not valid JSON" in ask.upload(lines(row) + content, purpose).json()["error"]["message"]
    assert "there is no row" in ask.upload(b"\xef\xbb\xbf\n", purpose).json()["error"]["message"]


def test_many_mistakes_are_counted(ask):
    message = ask.upload(b"{\n" * 25).json()["error"]["message"]
    assert message.startswith("file: 25 lines cannot be used:\n  line 1: ") and message.endswith("... and 15 more")
    assert message.count("\n  line") == 10


def test_a_name_is_never_a_path(ask, tmp_path):
    made = ask.upload(lines(CHAT), name="../../../evil.jsonl").json()
    assert made["filename"] == "../../../evil.jsonl" and kept(tmp_path) == [f"{made['id']}.jsonl"]
    assert not list(tmp_path.parent.rglob("evil*"))
    assert ask("GET", "/v1/files/..%2fserver.sqlite3").status_code == 404


def test_a_full_disk_is_said_and_leaves_nothing(ask, tmp_path):
    ask("GET", "/v1/files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As on a full disk, a write fails when the file has so many bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        answer = ask.upload(lines(*[CHAT] * 30_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answer.status_code == 507 and "disk is full" in answer.json()["error"]["message"]
    assert kept(tmp_path) == []


def test_deleting_makes_room_on_a_full_disk(ask, tmp_path):
    id = ask.upload(lines(CHAT)).json()["id"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        assert ask("DELETE", f"/v1/files/{id}").status_code == 507 and kept(tmp_path) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ask("GET", f"/v1/files/{id}/content").status_code == 404
    assert ask("DELETE", f"/v1/files/{id}").status_code == 200 and ask("GET", "/v1/files").json()["data"] == []


def test_a_store_that_another_writes_is_said(tmp_path):
    store, other = Store(tmp_path), sqlite3.connect(tmp_path / "server.sqlite3", isolation_level=None)
    store._base.execute("PRAGMA busy_timeout = 1")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Refusal, match="another server is writing") as caught:
        store.say("job", "hello")
    assert caught.value.status == 503 and caught.value.wait
    other.close()
    store.close()


def test_a_file_without_a_name(ask):
    form = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n{}\r\n--x--\r\n'
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    assert "it has no filename" in ask("POST", "/v1/files", content=form, headers=head).json()["error"]["message"]


def test_a_form_that_is_none(ask, tmp_path):
    broken = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{"mess'
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    for content, headers, sentence in (
        (broken, head, "breaks off"),
        (b"nonsense", head, "cannot be read"),
        (b"{}", {"Content-Type": "application/json"}, "no multipart"),
    ):
        answer = ask("POST", "/v1/files", content=content, headers=headers)
        assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]
    assert ask("POST", "/v1/files", files={"purpose": (None, "batch")}).json()["error"]["param"] == "file"
    more = {"purpose": "batch", "expires_after": "1"}
    answer = ask("POST", "/v1/files", data=more, files={"file": ("a", lines(ASKED))})
    assert answer.json()["error"]["param"] == "expires_after" and kept(tmp_path) == []


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    asked = Asked(tmp_path, monkeypatch, file_megabytes=0.01)
    assert asked.upload(lines(*[CHAT] * 1000)).status_code == 413

    async def unannounced():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(1000):
            yield lines(CHAT)

    head = {"Content-Type": "multipart/form-data; boundary=x"}
    assert asked("POST", "/v1/files", content=unannounced(), headers=head).status_code == 413
    assert kept(tmp_path) == []
    asked.close()


def test_an_address_says_all_that_it_takes(ask):
    assert ask("PATCH", "/v1/files").headers["allow"] == "GET, POST"
    assert ask("PATCH", "/v1/files/file-x").headers["allow"] == "DELETE, GET"
    assert ask("PATCH", "/v1/models/a/b").headers["allow"] == "DELETE, GET"
    assert ask("PATCH", "/v1/chat/completions").headers["allow"] == "POST"


def test_lists_come_in_parts(ask):
    made = [ask.upload(lines(CHAT)).json()["id"] for _ in range(3)] + [ask.upload(lines(ASKED), "batch").json()["id"]]
    first = ask("GET", "/v1/files?limit=3").json()
    assert [one["id"] for one in first["data"]] == made[:0:-1] and first["has_more"] is True
    rest = ask("GET", f"/v1/files?after={first['last_id']}").json()
    assert [one["id"] for one in rest["data"]] == made[:1] and rest["has_more"] is False
    assert [one["id"] for one in ask("GET", "/v1/files?order=asc").json()["data"]] == made
    assert [one["id"] for one in ask("GET", "/v1/files?purpose=batch").json()["data"]] == made[3:]
    assert ask("GET", "/v1/files?after=file-x").status_code == 400
    assert ask("GET", "/v1/files?limit=0").status_code == 400


def test_files_belong_to_the_key_that_sent_them(tmp_path, monkeypatch):
    scopes = {"one": ("tune",), "two": ("tune",), "boss": ("tune", "admin"), "reader": ("infer",)}
    keys = [Key(name=name, sha256=digest(name), scopes=may) for name, may in scopes.items()]
    asked = Asked(tmp_path, monkeypatch, keys)
    id = asked.upload(lines(CHAT), key="one").json()["id"]
    found = {name: asked("GET", f"/v1/files/{id}", name).status_code for name in scopes}
    assert found == {"one": 200, "two": 404, "boss": 200, "reader": 403}
    assert asked("GET", "/v1/files", "two").json()["data"] == []
    assert asked("DELETE", f"/v1/files/{id}", "two").status_code == 404
    assert asked("DELETE", "/v1/models/mini", "reader").status_code == 403
    asked.close()
