"""Where the text is computed when it is not computed here: the address of a server, and how it is asked."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from luthier.core.config import Config


class Backend(Config):
    """A server elsewhere that holds the weights and writes. A bare address, or `vllm` for the one on this machine, will do."""

    kind: Literal["vllm"] = "vllm"
    """What the server speaks: OpenAI's completions with the further settings of vLLM."""
    url: str = "http://localhost:8000"
    """Its address, with or without /v1 at the end."""
    model: str | None = None
    """What the server calls the model; needed where it serves several."""
    key: str | None = None
    """Name of the environment variable that holds the server's key."""
    concurrency: int = Field(32, gt=0)
    """Requests at once."""
    retries: int = Field(5, ge=0)
    """How often a request is sent again when the server is busy or the connection fails, after longer and longer waits."""
    timeout: float = Field(600, gt=0)
    """Longest silence of the server in seconds."""

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        value = {"kind": value} if isinstance(value, str) else value
        # `--backend http://host:8000 --set backend.model=x` arrives with the address as the kind.
        if isinstance(value, dict) and "://" in str(value.get("kind")):
            return {**{name: one for name, one in value.items() if name != "kind"}, "url": value["kind"]}
        return value

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        parts = urlsplit(url)
        try:
            whole = (
                parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            )
        except ValueError:
            whole = False
        if not whole or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is no address of a server; write it like http://host:8000")
        if parts.username or parts.password:
            raise ValueError("an address with a name or password in it would be kept in the record; set backend.key")
        return url.rstrip("/").removesuffix("/v1").rstrip("/")

    @field_validator("key")
    @classmethod
    def _name(cls, key: str | None) -> str | None:
        # What is refused is not shown: it may be the key itself.
        if key is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ValueError("this is no name of an environment variable; put the key into one, and name that")
        return key


def refuse_here(device: str, execution: str, draft: str | None = None) -> None:
    """Raises ValueError for settings of this machine, where a server computes."""
    if draft is not None:
        raise ValueError("draft has no effect with a backend, where a server computes; leave one of the two out")
    for name, value in (("device", device), ("execution", execution)):
        if value != "auto":
            raise ValueError(f"{name} has no effect with a backend, where a server computes; leave one of the two out")
