"""Requests to a server over HTTP: many at once, sent again when it is busy or gone, each failure one sentence."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import BadStatusLine, HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any, NoReturn
from urllib.parse import urlsplit

from luthier.core.errors import ConfigError, ServerError
from luthier.engine.backend import Backend
from luthier.engine.event_stream import read_data

# Seconds in which a connection must be made.
CONNECT = 10.0
# Longest wait between two tries, in seconds, where the server names none.
LONGEST = 60.0
# What a server, or the proxy before it, says when another try may succeed.
BUSY = (429, 502, 503, 504)


class _Again(Exception):
    """Another try may succeed: after `wait` seconds, where the server says so."""

    def __init__(self, kind: str, why: str, wait: float | None = None):
        super().__init__(why)
        self.kind, self.wait = kind, wait


class Client:
    """`again` counts the requests that were sent again, by the reason. `wait` waits so many seconds.

    Raises ConfigError where the key's environment variable is not set; what is asked raises ServerError.
    """

    def __init__(self, backend: Backend, wait: Callable[[float], object] | None = None):
        self.backend, self.url = backend, backend.url
        self.again: Counter[str] = Counter()
        self._headers = {"Content-Type": "application/json", "Connection": "close", "User-Agent": "luthier"}
        if backend.key is not None:
            key = os.environ.get(backend.key, "").strip()
            if not key or not key.isascii() or not key.isprintable():
                raise ConfigError(f"backend.key: the environment variable {backend.key} holds no key; set it")
            self._headers["Authorization"] = f"Bearer {key}"
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()

    def ask(self, path: str, body: dict[str, Any] | None = None, *, patient: bool = True) -> Any:
        """The server's answer, read as JSON. Without patience the first failure is the last."""
        tries = 0
        while True:
            try:
                with self._sent(path, body) as response:
                    content = response.read()
                return self._parsed(content)
            except _Again as again:
                tries += 1
                self._retry(again, tries, patient)

    def stream(self, path: str, body: dict[str, Any]) -> Generator[Any]:
        """The events of the server's answer up to [DONE], each read as JSON. An answer of which something was handed on is
        not asked for again."""
        tries = 0
        while True:
            handed = False
            try:
                with self._sent(path, body) as response:
                    for data in read_data(iter(lambda: response.read1(65536), b"")):
                        if data == "[DONE]":
                            return
                        event = self._parsed(data)
                        handed = True
                        yield event
                    raise _Again("a connection that broke", "the stream ends without its end mark")
            except _Again as again:
                if handed:
                    raise ServerError(
                        f"{self.url}: the answer broke off in the middle ({again}); ask again, and see that the server runs"
                    ) from None
                tries += 1
                self._retry(again, tries)

    @contextmanager
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        """As many threads as requests may be out at once. What is still out at the end is hung up on."""
        pool = ThreadPoolExecutor(self.backend.concurrency)
        try:
            yield pool
        finally:
            self._stopped.set()
            with self._lock:
                for one in self._sockets:
                    with suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)
            pool.shutdown(wait=True, cancel_futures=True)
            self._stopped.clear()

    @contextmanager
    def _sent(self, path: str, body: dict[str, Any] | None) -> Iterator[HTTPResponse]:
        """A connection of its own for each request: one that is kept may be closed by the server while it rests."""
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        made = kind(parts.hostname or "", parts.port, timeout=CONNECT)
        held: socket.socket | None = None
        response: HTTPResponse | None = None
        try:
            try:
                made.connect()
            except ssl.SSLCertVerificationError as err:
                raise ServerError(
                    f"{self.url}: the certificate of the server is not trusted ({err.verify_message}); mend it, or name its "
                    "authority in SSL_CERT_FILE"
                ) from None
            held = made.sock
            assert held is not None
            held.settimeout(self.backend.timeout)
            with self._lock:
                self._sockets.add(held)
            self._check_stopped()
            content = None if body is None else json.dumps(body, allow_nan=False).encode()
            made.request("GET" if body is None else "POST", parts.path + path, content, self._headers)
            response = made.getresponse()
            if response.status != 200:
                self._refuse(response, path)
            yield response
        except TimeoutError:
            if held is None:
                raise _Again("a connection that failed", f"no connection within {CONNECT:g} s") from None
            raise ServerError(
                f"{self.url}: nothing came for {self.backend.timeout:g} s; raise backend.timeout, or lower "
                "backend.concurrency or max_tokens"
            ) from None
        except (OSError, IncompleteRead) as err:
            why = "the connection broke off" if isinstance(err, IncompleteRead) else err.strerror or str(err)
            kind_of_trouble = "a connection that failed" if held is None else "a connection that broke"
            raise _Again(kind_of_trouble, f"{why[:1].lower()}{why[1:]}") from None
        except (BadStatusLine, HTTPException, ValueError):
            raise ServerError(
                f"{self.url}: what answers there does not speak HTTP; check the host and port of backend.url"
            ) from None
        finally:
            with self._lock:
                self._sockets.discard(held)
            if response is not None:
                response.close()
            made.close()

    def _retry(self, again: _Again, tries: int, patient: bool = True) -> None:
        """Wait, or say that it was tried often enough."""
        self._check_stopped()
        if not patient or tries > self.backend.retries:
            raise ServerError(
                f"{self.url}: no answer after {tries} tries: {again}; see that the server runs there and backend.url is right"
                if tries > 1
                else f"{self.url}: no answer: {again}; see that the server runs there and backend.url is right"
            ) from None
        if again.wait is not None and again.wait > self.backend.timeout:
            raise ServerError(
                f"{self.url}: the server is busy and asks to wait {again.wait:,.0f} s, which is more than backend.timeout; "
                "come back later, or raise it"
            ) from None
        with self._lock:
            self.again[again.kind] += 1
        self._wait(min(2.0 ** (tries - 1), LONGEST) if again.wait is None else again.wait)
        self._check_stopped()

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise ServerError(f"{self.url}: hung up, since another request failed or the work was stopped")

    def _parsed(self, content: bytes | str) -> Any:
        try:
            found = json.loads(content)
        except ValueError:
            shown = content[:60] if isinstance(content, str) else content[:60].decode("utf-8", errors="replace")
            raise ServerError(
                f"{self.url}: the answer is no JSON (it begins {shown!r}); check that backend.url is that of vLLM"
            ) from None
        if isinstance(found, dict) and found.get("error"):
            raise ServerError(f"{self.url}: the server failed ({_message(found)}); its own log says why")
        return found

    def _refuse(self, response: HTTPResponse, path: str) -> NoReturn:
        status = response.status
        try:
            said = _message(json.loads(response.read()))
        except ValueError:
            said = response.reason or "no reason given"
        if status in BUSY:
            raise _Again(f"HTTP {status}", f"HTTP {status}, {said}", _seconds(response.getheader("Retry-After")))
        if status in (401, 403) and self.backend.key is None:
            raise ServerError(
                f"{self.url}: the server asks for a key (HTTP {status}); put it into an environment variable and name that "
                "in backend.key"
            )
        if status in (401, 403):
            raise ServerError(
                f"{self.url}: the server does not take the key in {self.backend.key} (HTTP {status}); set the right one"
            )
        if status == 404:
            raise ServerError(
                f"{self.url}: the server knows no {path} for this model (HTTP 404: {said}); check backend.url and backend.model"
            )
        if 300 <= status < 400:
            place = response.getheader("Location") or "another place"
            raise ServerError(f"{self.url}: the server has moved to {place}; write its new address into backend.url")
        if status >= 500:
            raise ServerError(f"{self.url}: the server failed (HTTP {status}: {said}); its own log says why")
        raise ServerError(
            f"{self.url}: the server refuses what is asked (HTTP {status}: {said}); change the setting, or the server's limit"
        )


def _message(found: Any) -> str:
    """What an error says, in one line: of vLLM old and new, of OpenAI, of FastAPI."""
    inner = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or inner
    words = " ".join(str(inner).split())
    return words[:300] or "no reason given"


def _seconds(stated: str | None) -> float | None:
    """A Retry-After header, in seconds or as a date; None where there is none that can be read."""
    if stated is None:
        return None
    if stated.strip().isdigit():
        return float(stated)
    try:
        date = parsedate_to_datetime(stated)
    except ValueError:
        return None
    return max(0.0, ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
