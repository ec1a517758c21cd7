"""What /v1/responses takes: items of a conversation, tools, and how to answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, JsonValue, model_validator

from luthier.faces.server.citing import PASSAGES, Passages
from luthier.faces.server.drawing import Body


class InputText(Body):
    """A part of a turn."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    # As an answer holds them that is sent back.
    annotations: list[JsonValue] | None = None
    removed_citations: int | None = None
    logprobs: Annotated[list[JsonValue], Field(max_length=0)] | None = None


class InputMessage(Body):
    """A turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: None = None


class InputCall(Body):
    """A call that was made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Body):
    """What a function that was called gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None


class InputSearch(Body):
    """A search that was made before. Its passages are not read again; what is asked now is looked up anew."""

    type: Literal["file_search_call"]
    id: str | None = None
    queries: list[str] | None = None
    status: str | None = None
    results: JsonValue = None
    known: bool | None = None
    read: int | None = None


InputItem: TypeAlias = InputMessage | InputCall | InputCallOutput | InputSearch


class FunctionTool(Body):
    """A function that may be called."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class FileSearch(Body):
    """The last turn is looked up in these indexes, and answered from what they hold."""

    type: Literal["file_search"]
    vector_store_ids: Annotated[list[str], Field(min_length=1, max_length=16)]
    max_num_results: Passages = PASSAGES


class NamedFunction(Body):
    type: Literal["function"]
    name: str


class NamedSearch(Body):
    type: Literal["file_search"]


class TextFormat(Body):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> TextFormat:
        if self.type != "json_schema" and self.schema_ is not None:
            raise ValueError(f"schema goes with type: json_schema, not with {self.type}; leave one of the two out")
        return self


class TextSettings(Body):
    format: TextFormat | None = None


class ResponsesRequest(Body):
    """What /v1/responses takes. Nothing of it is kept unless `store` is true: send the whole conversation, or go on from a
    response that was kept."""

    model: str
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextSettings | None = None
    tools: list[Annotated[FunctionTool | FileSearch, Field(discriminator="type")]] | None = None
    """Functions, or one file_search; not both together."""
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | NamedSearch | None = None
    parallel_tool_calls: bool = True
    stream: bool = False
    user: str | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    include: list[Literal["file_search_call.results"]] | None = None
    store: bool | None = None
    """Whether the response is kept with what it answers; by default as the server was told, else not."""
    previous_response_id: str | None = None
    """A kept response of this key, whose conversation goes on; its instructions are not taken along."""
    # What other servers may do more: taken where it asks for nothing.
    metadata: Annotated[dict[str, str], Field(max_length=0)] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        searches = [one for one in self.tools or () if isinstance(one, FileSearch)]
        if isinstance(self.tool_choice, NamedSearch) and not searches:
            raise ValueError("tool_choice: file_search is not among the tools")
        if not searches:
            return self
        if len(searches) > 1:
            raise ValueError("tools: name all indexes in the vector_store_ids of one file_search")
        if self.functions or isinstance(self.tool_choice, NamedFunction):
            raise ValueError("tools: file_search and functions do not go together; ask with one of the two")
        if self.text is not None and self.text.format is not None and self.text.format.type != "text":
            raise ValueError("answers from an index are text with citations; leave text.format or file_search out")
        return self

    @property
    def functions(self) -> list[FunctionTool]:
        """Of the tools."""
        return [one for one in self.tools or () if isinstance(one, FunctionTool)]

    @property
    def search(self) -> FileSearch | None:
        """The search that is made before the model is asked."""
        if self.tool_choice == "none":
            return None
        return next((one for one in self.tools or () if isinstance(one, FileSearch)), None)


def turns_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The items as turns of a chat: calls belong to the turn of the assistant before them."""
    turns: list[dict[str, Any]] = []
    if body.instructions:
        turns.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*turns, {"role": "user", "content": body.input}]
    for item in body.input:
        if isinstance(item, InputMessage):
            content = item.content
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            turns.append({"role": item.role, "content": text})
        elif isinstance(item, InputCallOutput):
            turns.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        elif isinstance(item, InputCall):
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": ""})
            function = {"name": item.name, "arguments": item.arguments}
            turns[-1].setdefault("tool_calls", []).append(
                {"id": item.call_id, "type": "function", "function": function}
            )
    return turns
