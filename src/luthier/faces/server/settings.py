"""What a server serves, where, and to how many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from luthier.core.config import Config


class Limits(Config):
    """What one key may take; None: as much as there is."""

    requests_a_minute: int | None = Field(None, gt=0)
    """Requests a minute."""
    tokens_a_minute: int | None = Field(None, gt=0)
    """Tokens a minute, of prompts and answers together."""
    at_once: int | None = Field(None, gt=0)
    """Requests that are answered at the same time."""


class Serve(Config):
    """A server for the models of this machine, which speaks OpenAI's API."""

    models: tuple[str, ...] = ()
    """Models to serve: a shipped name, run:<id>, a directory or a hub id; NAME=MODEL gives it another name."""
    indexes: tuple[str, ...] = ()
    """Indexes to answer from, as `luthier index` makes them: NAME,NAME; NAME=INDEX gives one another name."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for every one of this machine."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen at; 0 takes a free one."""
    execution: Literal["auto", "model", "bfloat16", "int8", "int4"] = "auto"
    """How models are read, as for generate."""
    context: int | None = Field(None, gt=0)
    """Most tokens of a prompt and its answer together; by default what the model was made for."""
    streams: int = Field(32, gt=0)
    """Texts that are written at once by a model."""
    waiting: int = Field(256, gt=0)
    """Texts that wait for a model at most; more are refused with 429."""
    keys: Path | None = None
    """File of keys (`luthier serve --new-key`). Without one, and on this machine alone, no key is asked for."""
    limits: Limits = Limits()
    """What each key may take, where the file of keys does not say otherwise."""
    drain: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that answers have for their end when the server is to stop."""
    body_megabytes: Annotated[float, Field(gt=0)] = 32.0
    """Largest body of a request, files aside."""
    file_megabytes: Annotated[float, Field(gt=0)] = 512.0
    """Largest file that is uploaded."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that an answer may take, and that the server waits for more of a body."""
    log_prompts: bool = False
    """Write prompts and answers into the log."""
    keep_responses: bool = False
    """Keep what /v1/responses answers where a request does not say `store`; otherwise that is kept which says `store: true`."""
    response_days: Annotated[float, Field(gt=0)] = 30.0
    """Days for which responses are kept."""
    origins: tuple[str, ...] = ()
    """Origins whose pages may ask this server (CORS)."""
    certificate: Path | None = None
    """File of the certificate for TLS."""
    private_key: Path | None = None
    """File of its private key."""

    @field_validator("indexes", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(one.strip() for one in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Serve:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key go together; set both, or none")
        names = [one.partition("=")[0] for one in self.indexes]
        for at, name in enumerate(names):
            if name in names[:at]:
                raise ValueError(f"two indexes are named {name}; write NAME=INDEX to name one otherwise")
            if "/" in name:
                raise ValueError(
                    f"the index {name} is asked for in an address, where it would be taken apart; write NAME={name}"
                )
        return self

    @property
    def local(self) -> bool:
        """Whether nobody outside this machine can ask."""
        return self.host in ("127.0.0.1", "localhost", "::1")
