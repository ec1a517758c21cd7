"""A browser without a window for tests: Chromium, over its DevTools protocol through two pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-pipe",
]
# Chromium reads commands from the descriptor 3, and answers to 4.
LAUNCH = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3]); "
    "os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
SECONDS = 60.0


def find_browser() -> str | None:
    """The program, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """A tab."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._rest, self._id, self.events = b"", 0, []
        self._session = None
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method, **params):
        """A command of the protocol, and its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == self._id:
                assert "error" not in got, f"{method}: {got['error']}"
                return got["result"]
            self.events.append(got)

    def _next(self):
        while b"\0" not in self._rest:
            assert select.select([self._answers], [], [], SECONDS)[0], "the browser does not answer"
            self._rest += os.read(self._answers, 2**20)
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def run(self, script):
        """The value of an expression; of a promise, what it holds in the end."""
        result = self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, f"{script}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait(self, condition, seconds=30):
        """Until an expression is true in the page."""
        looked = (
            f"new Promise((done) => {{ const end = performance.now() + {seconds * 1000}; const look = () => {{ "
            f"let found = false; try {{ found = ({condition}); }} catch {{}} "
            "if (found || performance.now() > end) done(!!found); else setTimeout(look, 20); }; look(); })"
        )
        assert self.run(looked), f"not within {seconds} s: {condition}\n{self.run('document.body.innerText')[:2000]}"

    def open(self, address):
        self.do("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self):
        self.run("window.before = true")
        self.do("Page.reload")
        self.wait("document.readyState === 'complete' && !window.before")

    def click(self, selector):
        """With the mouse, in its middle."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector):
        x, y = self.middle(selector)
        self.do("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def middle(self, selector):
        """Where it is, scrolled into sight."""
        return self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.scrollIntoView({{block: 'nearest'}}); "
            "const box = one.getClientRects()[0]; return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )

    def type(self, text):
        self.do("Input.insertText", text=text)

    def key(self, name, code=0, modifiers=0, text=""):
        more = {"text": text} if text else {}
        for kind in ("keyDown", "keyUp"):
            self.do(
                "Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, modifiers=modifiers, **more
            )

    def size(self, width, height, dark=False, scale=1, phone=False):
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def shoot(self, path):
        """A picture of what is seen."""
        Path(path).write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))

    @property
    def troubles(self):
        """What the page threw, and what the browser did not let it do."""
        self.run("0")
        found = [one["params"] for one in self.events if one.get("method") == "Runtime.exceptionThrown"]
        entries = [one["params"]["entry"] for one in self.events if one.get("method") == "Log.entryAdded"]
        return found + [one for one in entries if one["level"] == "error" and one["source"] != "network"]


@contextmanager
def browsing(folder, *more):
    """A tab of a new browser, whose profile is in `folder`."""
    to_read, commands = os.pipe()
    answers, to_write = os.pipe()
    command = [sys.executable, "-c", LAUNCH, str(to_read), str(to_write), find_browser()]
    process = subprocess.Popen(
        [*command, *FLAGS, f"--user-data-dir={folder}", *more, "about:blank"],
        pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_read)
    os.close(to_write)
    try:
        yield Page(commands, answers)
    finally:
        os.close(commands)
        process.terminate()
        process.wait()
        os.close(answers)
