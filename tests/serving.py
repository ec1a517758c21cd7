"""A server on this machine for tests: it speaks what it is told to, or answers with the engine here as vLLM would."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Quiet(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Nothing: clients that hang up are what is tested."""


@contextmanager
def serving(answer):
    """The address at which `answer(handler, path, body)` answers; `body` is None for GET."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self, self.path, None)

        def do_POST(self):
            answer(self, self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *said):
            pass

    with Quiet(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def send(handler, content, status=200, **headers):
    """JSON, or bytes as they are."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def as_events(events):
    """Events as vLLM streams them."""
    return b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in events) + b"data: [DONE]\n\n"


def chunked(content):
    """A whole answer of HTTP/1.1 in one piece."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)


def models(*names, **more):
    """What /v1/models of vLLM says."""
    cards = [
        {
            "id": name,
            "object": "model",
            "created": 1748000000,
            "owned_by": "vllm",
            "root": f"/models/{name}",
            "parent": None,
            "max_model_len": 128,
            "permission": [{"id": "modelperm-1", "object": "model_permission", "allow_sampling": True}],
            **more,
        }
        for name in names
    ]
    return {"object": "list", "data": cards}


def completion(*choices, **more):
    """A whole answer of vLLM."""
    return {
        "id": "cmpl-8f1",
        "object": "text_completion",
        "created": 1748000000,
        "model": "tuned",
        "choices": [
            {"index": at, "logprobs": None, "stop_reason": None, "prompt_logprobs": None, **one}
            for at, one in enumerate(choices)
        ],
        "usage": {"prompt_tokens": 5, "total_tokens": 8, "completion_tokens": 3, "prompt_tokens_details": None},
        "kv_transfer_params": None,
        **more,
    }


class Live:
    """Answers with `model` by the engine here, in the protocol of vLLM; `asked` holds what it was asked."""

    def __init__(self, model, name="tuned", **card):
        self.model, self.name, self.card = model, name, card
        self.asked = []
        self.busy = 0
        """So many requests are turned away first."""
        self._lock = threading.Lock()

    def __call__(self, handler, path, body):
        if path == "/v1/models":
            return send(handler, models(self.name, **self.card))
        with self._lock:  # one model is not for several threads
            self.asked.append(body)
            if self.busy:
                self.busy -= 1
                return send(handler, {"error": {"message": "too many", "code": 429}}, 429, Retry_After="0")
            request = self.write(body)
        if not body.get("stream"):
            return send(handler, completion(self.choice(request, request.written, request.finish)))
        events = [completion(self.choice(request, [token], None, at)) for at, token in enumerate(request.written, 1)]
        events += [completion(self.choice(request, [], request.finish)), completion()]
        content = chunked(as_events(events))
        handler.wfile.write(content)
        return None

    def write(self, body):
        """The text that goes on from a prompt."""
        from luthier.engine.generate import engine_for
        from luthier.engine.sampling import Sampling

        same = (
            "max_tokens",
            "min_tokens",
            "temperature",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        sampling = Sampling(
            **{name: body[name] for name in same},
            logit_bias=body.get("logit_bias", {}),
            stop=body["stop"],
            stop_ids=body["stop_token_ids"],
            ignore_stop=True,
        )
        engine = engine_for(self.model, [len(body["prompt"])], sampling.max_tokens, 1)
        request = engine.add(body["prompt"], sampling)
        engine.run()
        return request

    def choice(self, request, ids, finish, at=None):
        """Some of its tokens, with the text that they make (of a piece: what it adds)."""
        from luthier.engine.pieces import complete

        text = complete(self.model, request.written[:at], request.sampling, 1).text
        if at is not None:
            text = text[len(complete(self.model, request.written[: at - 1], request.sampling, 1).text) :]
        return {"text": text if ids else "", "token_ids": ids, "finish_reason": finish}
