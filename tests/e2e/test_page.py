"""The server's page in a browser: two models asked at once, and all that people do with their answers."""

import json
import os
import queue
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from browser import browsing, find_browser

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is found: install chromium to see the page tested"),
]
LUTHIER = [sys.executable, "-m", "luthier", "serve"]
DONE = "document.querySelectorAll('[aria-busy=true]').length === 0"
TEXTS = "[...document.querySelectorAll('.answer .text')].map((one) => one.textContent)"
# Answers that are long enough to be seen coming, and to be stopped, whatever the model would say.
LONG = {"type": "string", "pattern": "^((sea|wave|salt) ){40,45}$"}
ENTER = {"name": "Enter", "code": 13, "text": "\r"}


@contextmanager
def serving(folder, *arguments):
    """The address of a server of the command line."""
    environment = os.environ | {"LUTHIER_RUNS": str(folder / "runs"), "HF_HUB_OFFLINE": "1", "LUTHIER_LANG": "en"}
    process = subprocess.Popen(
        [*LUTHIER, *arguments, "--port", "0"], stderr=subprocess.PIPE, text=True, env=environment
    )
    lines = queue.Queue()
    reading = threading.Thread(target=lambda: [lines.put(line) for line in process.stderr])
    reading.start()
    try:
        said = []
        while "http://" not in (line := lines.get(timeout=180)):
            said.append(line)
            assert process.poll() is None, said
        yield next(word for word in line.split() if word.startswith("http://"))
    finally:
        process.terminate()
        process.wait()
        reading.join()
        process.stderr.close()


def test_two_models_are_asked_side_by_side(tmp_path):
    keys = tmp_path / "keys.json"
    made = subprocess.run([*LUTHIER, "--keys", keys, "--new-key", "page"], capture_output=True, text=True, check=True)
    with (
        serving(tmp_path, "mini", "twin=mini", "--keys", str(keys)) as address,
        browsing(tmp_path / "profile", "--lang=en-US") as page,
    ):
        page.size(1280, 800)
        page.open(address)
        give_key(page, made.stdout.strip())
        slow(page, 100_000)
        ask_two(page)
        show_probabilities(page)
        stop_one(page)
        go_on(page)
        slow(page, -1)
        refuse(page)
        export(page)
        find_again(page)
        use_phone(page)
        line_up(page)
        assert page.troubles == []


def slow(page, bytes_a_second):
    """Let the network be so slow that answers come in pieces, however fast they are written; -1: as fast as it is."""
    page.do("Network.enable")
    page.do(
        "Network.emulateNetworkConditions",
        offline=False, latency=0, downloadThroughput=bytes_a_second, uploadThroughput=-1,
    )  # fmt: skip


def put(page, setting, text):
    """Write a setting into its field."""
    page.run(
        f"(() => {{ const one = document.getElementById('{setting}'); one.value = {json.dumps(text)}; "
        "one.dispatchEvent(new Event('input')); one.dispatchEvent(new Event('change')); })()"
    )


def give_key(page, key):
    """A wrong one is refused, and the right one is kept for this tab alone."""
    page.wait("!document.getElementById('key-form').hidden")
    for one in ("lk-wrong", key):
        page.click("#key")
        page.type(one)
        page.key(**ENTER)
        if one != key:
            page.wait("document.getElementById('key-error').textContent.includes('not known')")
    page.wait("document.getElementById('key-form').hidden")
    page.wait("[...document.querySelectorAll('.model')].map((one) => one.value).join() === 'mini,twin'")
    assert page.run("sessionStorage.getItem('luthier.key')") == key
    assert key not in page.run("JSON.stringify(localStorage)")


def ask_two(page):
    """Both answers come in pieces; Enter that ends a word of an input method sends nothing."""
    put(page, "schema", json.dumps(LONG))
    page.click("#message")
    page.type("Tell me about the sea.")
    page.run(
        "document.getElementById('message').dispatchEvent(new KeyboardEvent('keydown', "
        "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert page.run("document.querySelectorAll('.answer').length") == 0
    page.run(
        "window.lengths = new Map(); new MutationObserver(() => document.querySelectorAll('.answer .text')"
        ".forEach((one, at) => lengths.set(at, (lengths.get(at) ?? new Set()).add(one.textContent.length))))"
        ".observe(document.getElementById('columns'), "
        "{childList: true, subtree: true, characterData: true})"
    )
    page.key(**ENTER)
    page.wait(f"document.querySelectorAll('.answer').length === 2 && {DONE}")
    assert all(40 <= len(json.loads(text).split()) <= 45 for text in page.run(TEXTS))
    assert all(count > 2 for count in page.run("[...lengths.values()].map((one) => one.size)"))
    facts = page.run("[...document.querySelectorAll('.facts')].map((one) => one.textContent)")
    assert len(facts) == 2 and all("first token after" in one and "tokens/s" in one for one in facts)


def show_probabilities(page):
    """Tokens make up the answer; pointing at one, or going there by key, shows what else was likely."""
    texts = page.run(TEXTS)
    page.click("#views label:nth-of-type(3)")
    page.wait("document.querySelectorAll('.token').length > 4")
    assert page.run(TEXTS) == texts
    page.hover(".token")
    page.wait("!document.getElementById('tip').hidden")
    rows = page.run("[...document.querySelectorAll('.tip-row')].map((one) => one.textContent)")
    assert 5 <= len(rows) <= 6 and all("%" in row for row in rows)
    page.hover("#message")
    page.wait("document.getElementById('tip').hidden")
    page.run("document.querySelector('.token').focus()")
    page.key("ArrowRight", 39)
    assert page.run("document.activeElement === document.querySelectorAll('.token')[1]")
    assert page.run("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.click("#views label:nth-of-type(1)")


def stop_one(page):
    """One column alone is asked, and stopped by Esc; what it wrote stays."""
    page.run(
        "(() => { const one = document.getElementById('target'); one.selectedIndex = 2; "
        "one.dispatchEvent(new Event('change')); })()"
    )
    # Whatever is written is stopped at its first piece.
    page.run(
        "new MutationObserver((_, seeing) => { "
        "const one = document.querySelectorAll('.column')[1].querySelectorAll('.answer .text')[1]; "
        "if (one?.textContent) { seeing.disconnect(); document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'})); } })"
        ".observe(document.getElementById('columns'), {childList: true, subtree: true, characterData: true})"
    )
    page.click("#message")
    page.type("And a long story.")
    page.key(**ENTER)
    page.wait(f"document.querySelectorAll('.answer').length === 3 && {DONE}")
    assert "stopped" in page.run("document.querySelectorAll('.facts')[2].textContent")
    assert page.run("document.querySelectorAll('.column')[0].querySelectorAll('.answer').length") == 1


def go_on(page):
    """The last turn is written anew, changed, deleted and brought back."""
    buttons = "[...document.querySelectorAll('.column')[1].querySelectorAll('.acts button')]"
    before = page.run(f"{TEXTS}[2]")
    page.run(f"{buttons}.findLast((one) => one.textContent === 'Regenerate').click()")
    page.wait(f"{DONE} && {TEXTS}[2].length > 0 && {TEXTS}[2] !== {json.dumps(before)}")
    page.run(f"{buttons}.findLast((one) => one.textContent === 'Edit').click()")
    page.run("document.activeElement.value = 'Another question'")
    page.key(**ENTER)
    page.wait(f"{DONE} && [...document.querySelectorAll('.user-text')].at(-1).textContent === 'Another question'")
    page.run(f"{buttons}.findLast((one) => one.textContent === 'Delete').click()")
    page.wait("document.querySelectorAll('.answer').length === 2")
    page.click("#toast button")
    page.wait("document.querySelectorAll('.answer').length === 3")


def refuse(page):
    """What the server says is wrong stands in the answer's place; what is wrong here is not sent."""
    put(page, "max_tokens", "90000")
    page.click("#message")
    page.type("Too much")
    page.key(**ENTER)
    page.wait("document.querySelector('.failure')?.textContent.includes('90000')")
    assert page.run("[...document.querySelectorAll('.acts button')].some((one) => one.textContent === 'Retry')")
    put(page, "max_tokens", "")
    put(page, "schema", "{")
    count = page.run("document.querySelectorAll('.answer').length")
    page.click("#message")
    page.type("Not sent")
    page.key(**ENTER)
    assert page.run("document.activeElement.id") == "schema" and not page.run(
        "document.getElementById('settings').hidden"
    )
    assert page.run("document.querySelectorAll('.answer').length") == count
    page.click("#reset-settings")
    assert page.run("document.getElementById('schema').value") == ""
    page.click("#close-settings")


def export(page):
    """The line is what `tune` takes: turns that failed are left out."""
    line = page.run(
        "(async () => { const {asLine, load} = await import('/page/conversation.js'); dispatchEvent(new Event('pagehide')); "
        "const found = load(); return asLine(found.columns[1], found.settings); })()"
    )
    assert line.endswith("\n") and line.count("\n") == 1
    roles = [turn["role"] for turn in json.loads(line)["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    # What is written after a call is what its tool gave.
    sent = page.run(
        "(async () => { const {messagesOf} = await import('/page/conversation.js'); "
        "const call = {id: 'call_1', name: 'look', arguments: '{}'}; "
        "const turns = [{user: 'How?', answer: {text: '', calls: [call]}}, {user: 'It rains.'}]; "
        "return JSON.stringify(messagesOf({turns}, {system: ''}, turns[1])); })()"
    )
    assert json.loads(sent)[2] == {"role": "tool", "tool_call_id": "call_1", "content": "It rains."}


def find_again(page):
    """In Chinese, after the page was loaded anew; and what looks like HTML is text."""
    page.run("document.getElementById('language').click()")
    page.wait("document.documentElement.lang === 'zh-CN' && document.getElementById('send').textContent === '发送'")
    page.run(
        "dispatchEvent(new Event('pagehide')); addEventListener('pagehide', () => { "
        "const kept = JSON.parse(localStorage['luthier.conversation']); "
        "kept.columns[0].turns[0].answer.text = '**bold** <img src=x onerror=\"window.broken = 1\">'; "
        "localStorage['luthier.conversation'] = JSON.stringify(kept); })"
    )
    page.reload()
    page.wait("document.querySelectorAll('.answer').length === 4")
    assert page.run("document.getElementById('send').textContent") == "发送"
    assert page.run("document.querySelector('.user-text').textContent") == "Tell me about the sea."
    assert page.run("document.querySelector('.answer strong').textContent") == "bold"
    assert "<img src=x" in page.run("document.querySelector('.answer .text').textContent")
    assert page.run("document.querySelectorAll('.answer img').length === 0 && window.broken === undefined")


def use_phone(page):
    """Columns are tabs, and nothing is wider than the screen."""
    page.size(360, 740, dark=True, phone=True)
    page.wait("getComputedStyle(document.getElementById('tabs')).display === 'flex'")
    shown = "[...document.querySelectorAll('.column')].map((one) => one.offsetWidth > 0)"
    assert page.run(shown) == [True, False]
    page.run("document.querySelector('.tab').focus()")
    page.key("ArrowRight", 39)
    assert page.run(shown) == [False, True]
    assert page.run("document.documentElement.scrollWidth") <= 360
    # Chinese may be broken after any character: a button is still one line.
    heights = page.run("[...document.querySelectorAll('summary, button')].map((one) => one.offsetHeight)")
    assert 0 < max(heights) < 48, heights


def line_up(page):
    """Tokens that make up a character together are one, wherever the pieces of the answer are cut."""
    tried = (
        "(async () => { const {lineUp} = await import('/page/tokens.js'); const tokens = [], lines = lineUp(tokens); "
        "const log = (token) => ({token, logprob: -1, top_logprobs: []}); "
        "for (const [text, logs] of %s) lines.add(text, logs.map(log)); lines.end(); "
        "return tokens.map((one) => [one[0], one[1], one[3]]); })()"
    )
    half = "\ufffd"
    for pieces in (
        [["A琴", ["A", half, half]], [" is", [" is"]]],
        [["A", ["A", half]], ["琴 is", [half, " is"]]],
        [["A琴 is", ["A", half, half, " is"]]],
    ):
        found = page.run(tried % json.dumps(pieces))
        assert found == [["A", -1, 1], ["琴", -2, 2], [" is", -1, 1]], pieces
    assert page.run(tried % json.dumps([["no", []], [" logs", []]])) == [["no logs", None, 0]]
