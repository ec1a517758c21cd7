"""Luthier as somebody at a terminal meets it: the live bar, Ctrl-C, a conversation; and plain lines when piped."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from luthier.core.run import read_record
from luthier.faces.cli.main import main
from tiny import tiny_model

ROWS = [{"text": f"{word} number {at}"} for at in range(16) for word in ("win a prize", "see you")]
# Takes the terminal as its own, as a shell would arrange, so that Ctrl-C there is a signal here.
START = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
CTRL_C = b"\x03"


@pytest.fixture
def command(tmp_path):
    """A tuning of a few seconds."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    flags = ["--data", str(data), "--objective", "pretrain", "--batch-size", "4", "--checkpoint-every", "20"]
    return ["tune", "--model", str(tiny_model("gpt2")), *flags, "--name", "one", "--no-baselines", "--threads", "1"]


def run_on_terminal(
    arguments: list[str], ready: Callable[[], bool] = lambda: False, keys: bytes = b""
) -> tuple[int, str]:
    """(exit code, everything on the screen); `keys` are typed once `ready` says so."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    words = [sys.executable, "-c", START, sys.executable, "-m", "luthier", *arguments]
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment
    )
    os.close(theirs)
    screen, deadline = b"", time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if keys and ready():
                os.write(ours, keys)
                keys = b""
            if not select.select([ours], [], [], 0.01)[0]:
                continue
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end is closed
                piece = b""
            if not piece:
                break
            screen += piece
        return process.wait(timeout=30), screen.decode("utf-8")
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def has_begun(path) -> bool:
    return path.exists() and '"event": "step"' in path.read_text(encoding="utf-8")


def test_a_terminal_shows_a_live_bar(command):
    code, screen = run_on_terminal([*command, "--steps", "30"])
    assert code == 0
    assert re.search(r"tuning.*━.*\d+%.*loss \d+\.\d{4} · [\d,]+ tokens/s · \d+ s left", screen), screen
    assert "\x1b[?25l" in screen and screen.rfind("\x1b[?25h") > screen.rfind("\x1b[?25l"), "the cursor comes back"
    assert "Next: luthier generate run:one" in screen.splitlines()[-1]
    assert "epochs" not in screen and "learning_rate: " in screen, "what was chosen is said, what was given is not"


def test_a_pipe_gets_plain_lines(command):
    words = [sys.executable, "-m", "luthier", *command, "--steps", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert re.search(r"^step 1/3  loss \d+\.\d{4}  [\d,]+ tokens/s  \d+ s left$", done.stderr, re.M)
    assert "loading the model" in done.stderr and "run:one is in" in done.stdout
    assert "tokens/s" not in done.stdout, "results and progress do not mix"


def test_ctrl_c_says_how_to_go_on_and_going_on_ends_well(command, runs, capsys):
    code, screen = run_on_terminal(
        [*command, "--steps", "120"], lambda: has_begun(runs / "one" / "events.jsonl"), CTRL_C
    )
    assert code == 130 and "Traceback" not in screen
    assert screen.splitlines()[-1] == "luthier: stopped; go on with: luthier tune --resume run:one"
    record = read_record(runs / "one")
    assert record.state == "interrupted" and (runs / "one" / "report.html").exists() is False
    assert main(["tune", "--resume", "run:one"]) == 0
    record = read_record(runs / "one")
    assert record.state == "finished" and record.numbers["steps"] == 120
    steps = [json.loads(line) for line in (runs / "one" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["step"] for one in steps if one["event"] == "step"] == list(range(1, 121)), (
        "no step is lost or done twice"
    )


def test_ctrl_c_before_anything_is_learned_leaves_nothing(command, runs, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("luthier.verbs.reading.load_data", stop)
    assert main(command) == 130
    assert "stopped" in capsys.readouterr().err and not list(runs.glob("*"))


def test_doctor_says_what_is_here(capsys, runs):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for name in (
        "machine",
        "versions",
        "torch ",
        "kernels  ",
        "extra             parquet",
        "hub               HF_ENDPOINT",
        f"runs              {runs}",
    ):
        assert name in said
    assert said.splitlines()[-1] == "Everything that tuning and judging need is here."


def talk(lines: list[str], monkeypatch, capsys, *flags: str) -> list[str]:
    """What a conversation through a pipe prints, line by line."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    assert main(["chat", "mini", "--temperature", "0", "--max-tokens", "6", *flags]) == 0
    return capsys.readouterr().out.splitlines()


def read_turns(path) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in json.loads(path.read_text(encoding="utf-8"))["messages"]]


def test_a_conversation_through_a_pipe(monkeypatch, capsys, tmp_path):
    saved = [tmp_path / f"{at}.jsonl" for at in range(4)]
    lines = ["Hello", "", f"/save {saved[0]}", "What is a fox?", f"/save {saved[1]}", "/undo", f"/save {saved[2]}"]
    lines += ["/reset", "/undo", "/system Be brief.", "Hello", f"/save {saved[3]}", "/quit", "never read"]
    said = talk(lines, monkeypatch, capsys)
    one, two, three, four = map(read_turns, saved)
    assert [role for role, _ in one] == ["user", "assistant"] and one[0][1] == "Hello" and one[1][1]
    assert two[:2] == one and two[2] == ("user", "What is a fox?") and len(two) == 4
    assert three == one, "/undo takes back a question and its answer"
    assert four[:2] == [("system", "Be brief."), ("user", "Hello")] and len(four) == 3
    answers = [turn[1] for turn in (one[1], two[3], four[2])]
    added = [f"added to {path}" for path in saved]
    assert said == [answers[0], added[0], answers[1], added[1], added[2], answers[2], added[3]]
    # What is saved can be learned.
    assert main(["prepare", "show", str(saved[1]), "--set", "data.split.validation=0"]) == 0
    assert "What is a fox?" in capsys.readouterr().out


def test_a_conversation_begins_with_the_system_message_and_knows_its_commands(monkeypatch, capsys, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ["/hepl", "/help", f"/save {path}", "hello", f"/save {tmp_path}", f"/save {path}"]
    said = talk(lines, monkeypatch, capsys, "--system", "Be brief.")
    assert said[0] == "no command /hepl; did you mean '/help'?" and "/undo  take back the last turn" in said[1]
    assert "nothing was said yet, so there is nothing to save" in said
    assert any(line.startswith(f"{tmp_path}: cannot be written (Is a directory)") for line in said)
    assert read_turns(path)[:2] == [("system", "Be brief."), ("user", "hello")]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=str)
def test_memory_that_runs_out_in_any_command_is_one_sentence(error, monkeypatch, capsys, runs):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("luthier.models.load.load_network", fail)
    assert main(["generate", "mini", "hello", "--execution", "model"]) == 2
    said = capsys.readouterr().err
    assert "memory ran out; set a shorter max_length" in said and "bug" not in said
