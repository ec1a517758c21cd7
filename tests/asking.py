"""A server that is asked in process, without models and without a socket, and rows to send it."""

import asyncio
import json
import threading
import time

import httpx

from luthier.faces.server.app import make_app
from luthier.faces.server.server import make_server
from luthier.faces.server.settings import Serve

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
LIKED = {
    "input": {"messages": [{"role": "user", "content": "Hi"}]},
    "preferred_output": [{"role": "assistant", "content": "Hello"}],
    "non_preferred_output": [{"role": "assistant", "content": "What"}],
}
ASKED = {
    "custom_id": "one",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "mini", "messages": [{"role": "user", "content": "Hi"}]},
}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Asked:
    """A server without models and without a socket."""

    def __init__(self, folder, monkeypatch, keys=None, **settings):
        monkeypatch.setenv("LUTHIER_RUNS", str(folder))
        made = Serve(**settings)
        self.server = make_server(made, lambda event: None)
        self.app = make_app(self.server, keys)

    def __call__(self, method, path, key=None, **more):
        async def ask():
            transport = httpx.ASGITransport(self.app)
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                return await client.request(method, path, **more)

        return asyncio.run(ask())

    def upload(self, content, purpose="fine-tune", name="a.jsonl", key=None):
        return self("POST", "/v1/files", key, data={"purpose": purpose}, files={"file": (name, content)})

    def close(self):
        if "store" in self.server.parts:
            self.server.parts["store"].close()


def until(check, seconds=90.0):
    """What `check` finds in the end."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end
        threading.Event().wait(0.1)
    return found


async def until_async(check, seconds=90.0):
    """The same, while others on this loop work."""
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.02)
