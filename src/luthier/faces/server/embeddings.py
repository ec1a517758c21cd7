"""/v1/embeddings"""

from __future__ import annotations

import base64
import struct
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from luthier.faces.server.answering import while_here
from luthier.faces.server.drawing import Body, TokenId
from luthier.faces.server.refusals import RESPONSES
from luthier.faces.server.server import TheKey, TheServer
from luthier.faces.server.writing import read

routes = APIRouter(tags=["reading"], responses=RESPONSES)
Ids = Annotated[list[TokenId], Field(min_length=1)]
MOST = 2048


class EmbeddingRequest(Body):
    """What /v1/embeddings takes."""

    model: str
    input: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MOST)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Keep so many first numbers."""
    user: str | None = None
    normalise: bool = True
    """Scale vectors to length 1, as OpenAI's are."""

    @property
    def inputs(self) -> list[str | list[int]]:
        """One or many, each a text or its tokens."""
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


class Vector(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class ReadUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """What /v1/embeddings answers."""

    object: Literal["list"] = "list"
    data: list[Vector]
    model: str
    usage: ReadUsage


def read_usage(usage: dict[str, int]) -> ReadUsage:
    """Of what an engine counted."""
    return ReadUsage(prompt_tokens=usage["prompt"], total_tokens=usage["prompt"])


@routes.post("/v1/embeddings", response_model=Embeddings)
async def make_embeddings(body: EmbeddingRequest, request: Request, server: TheServer, key: TheKey) -> Embeddings:
    """A vector of each text."""
    served = server.shelf.find(body.model)
    asked = {"inputs": body.inputs, "dimensions": body.dimensions, "normalise": body.normalise, "tenant": key.name}
    found = await while_here(request, read(request, served, "embed", asked), server.settings.timeout)
    data = [Vector(index=at, embedding=_form(one, body.encoding_format)) for at, one in enumerate(found["vectors"])]
    return Embeddings(data=data, model=served.name, usage=read_usage(found["usage"]))


def _form(vector: list[float], form: str) -> list[float] | str:
    if form == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
