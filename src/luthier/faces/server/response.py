"""What /v1/responses answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, JsonValue

from luthier.faces.server.items import Output


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Incomplete(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(BaseModel):
    code: str
    message: str


class ResponseBody(BaseModel):
    """What /v1/responses answers."""

    id: str
    object: Literal["response"] = "response"
    created_at: float
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    model: str
    output: list[Output]
    parallel_tool_calls: bool
    previous_response_id: str | None = None
    store: bool = False
    """Whether it is kept, to be read and gone on from."""
    temperature: float
    top_p: float
    text: dict[str, JsonValue] = {}
    tool_choice: JsonValue = "auto"
    tools: list[JsonValue] = []
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str] = {}
