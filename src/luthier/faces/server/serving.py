"""A server from its start to its end."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from luthier.core.errors import ConfigError, MissingExtra
from luthier.faces.server import loops
from luthier.faces.server.keys import read_keys
from luthier.faces.server.settings import Serve
from luthier.faces.server.shelf import Served, names_of

Say = Callable[[str], None]


def serve(settings: Serve, say: Say) -> int:
    """Serve until a signal says to stop: the first lets what is being answered end, a second one does not.

    Raises ConfigError for an address that is taken or open to all without keys, MissingExtra, and what loading raises.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as err:
        raise MissingExtra(err.name or "fastapi", "serve", "luthier serve") from None
    if settings.keys is None and not settings.local:
        raise ConfigError(
            f"host: {settings.host} can be asked from other machines, so it needs keys: "
            "luthier serve --keys keys.json --new-key NAME makes one"
        )
    _check_certificate(settings)
    return loops.run(_run(settings, say))


def _check_certificate(settings: Serve) -> None:
    """Raises ConfigError for files with which nobody could be answered by https, before any model is loaded."""
    if settings.certificate is None or settings.private_key is None:
        return
    for name, path in (("certificate", settings.certificate), ("private_key", settings.private_key)):
        try:
            path.read_bytes()
        except OSError as err:
            raise ConfigError(
                f"{name}: {path} cannot be read ({err.strerror}); give the file of PEM that is meant"
            ) from None
    try:
        # Nobody is there to be asked for a password.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            settings.certificate, settings.private_key, password=lambda: ""
        )
    except ssl.SSLError as err:
        certificate, key = settings.certificate, settings.private_key
        if "MISMATCH" in str(err.reason):
            raise ConfigError(
                f"certificate: {certificate} and {key} do not belong together; give the key that it was made for"
            ) from None
        raise ConfigError(
            f"certificate: {certificate} and {key} hold no certificate and private key in PEM, or one with a password "
            f"({err.reason}); mend them"
        ) from None


async def _run(settings: Serve, say: Say) -> int:
    import uvicorn

    from luthier.faces.server.app import make_app
    from luthier.faces.server.direct import Direct
    from luthier.faces.server.keeping import working
    from luthier.faces.server.server import make_server

    keys = read_keys(settings.keys) if settings.keys is not None else None
    listening = _listen(settings)
    server = make_server(settings, lambda event: _tell(event, say))
    shelf, indexes = server.shelf, server.indexes
    try:
        await indexes.start()
        for name, facts in indexes.facts.items():
            say(_holds(name, facts))
        for name, source in names_of(settings.models):
            served = await shelf.load(source, name)
            say(_plan(served))
        config = uvicorn.Config(
            Direct(make_app(server, keys, lambda line: print(line, flush=True))),
            log_level="warning",
            access_log=False,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.private_key,
            timeout_keep_alive=75,
            lifespan="off",
            # There are none here, and nobody is to be told to install them.
            ws="none",
        )
        web = _Web(config, server, say)
        host, port = listening.getsockname()[:2]
        address = f"{'https' if settings.certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
        say(_welcome(address, settings))
        async with working(server, say):
            await web.serve(sockets=[listening])
    finally:
        listening.close()
        await shelf.close()
        await indexes.close()
    return 0


def _listen(settings: Serve) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        # Whoever is told of the address may ask at once.
        listening.listen(1024)
    except OSError as err:
        listening.close()
        raise ConfigError(
            f"{settings.host}:{settings.port} cannot be listened at ({err.strerror}); choose another --port"
        ) from None
    return listening


def _Web(config: Any, server: Any, say: Say) -> Any:
    import uvicorn

    class Web(uvicorn.Server):
        """uvicorn, that lets answers end before it does."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            if server.draining:
                self.should_exit = self.force_exit = True
                return
            server.draining = True
            if server.going:
                say(
                    f"ending within {server.settings.drain:g} s; requests still answered: {server.going} (again: at once)"
                )
            asyncio.get_running_loop().create_task(self._drain())

        async def _drain(self) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(server.settings.drain):
                    await server.idle.wait()
            if server.going:
                # Their streams end with an error that says so.
                await server.shelf.close()
                with suppress(TimeoutError):
                    async with asyncio.timeout(2):
                        await server.idle.wait()
            self.should_exit = True

    return Web(config)


def _tell(event: dict[str, Any], say: Say) -> None:
    if event["event"] == "warning":
        say(f"warning: {event['message']}")


def _plan(served: Served) -> str:
    """What a model takes, and how it is read."""
    name, facts = served.name, served.process.facts
    if served.parent is not None:
        return f"{name}: an adapter beside {served.parent}, in its process: {served.parameters:,} weights more"
    weights, kept, beside = (facts[part] / 1e6 for part in ("weight_bytes", "kept_bytes", "beside_bytes"))
    lines = [f"{name}: {facts['family']}, {facts['engine']}"]
    if facts["kept_tokens"]:
        lines.append(
            f"  {weights:,.0f} MB of weights; up to {kept:,.0f} MB for {facts['kept_tokens']:,} tokens of keys and values: "
            f"{facts['streams']} texts at once, a context of {facts['context']:,}"
        )
    else:
        lines.append(f"  {weights:,.0f} MB of weights; nothing is kept of a text; a context of {facts['context']:,}")
    if beside:
        lines.append(f"  up to {beside:,.0f} MB more where labels and pairs are scored or vectors are made")
    return "\n".join(lines)


def _holds(name: str, facts: dict[str, Any]) -> str:
    """What an index holds, and how it is searched."""
    how = "by words" if facts["encoder"] is None else f"by words and by meaning ({facts['encoder']})"
    return f"index {name}: {facts['passages']:,} passages of {facts['files']:,} files, searched {how}"


def _welcome(address: str, settings: Serve) -> str:
    name = names_of(settings.models)[0][0] if settings.models else "NAME"
    key = ' -H "Authorization: Bearer $LUTHIER_KEY"' if settings.keys is not None else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"listening at {address} (the page is there too; the base URL for OpenAI's client is {address}/v1)\n"
        f"  curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    )
