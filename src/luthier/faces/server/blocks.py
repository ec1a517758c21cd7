"""What /v1/messages takes: turns of blocks, tools, and how to answer, in the words of Anthropic's API."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from luthier.faces.server.drawing import Body


class CacheControl(Body):
    """What was read once is found again here anyway, as long as there is room for it."""

    type: Literal["ephemeral"]


class TextBlock(Body):
    """A text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    # As an answer holds it that is sent back.
    citations: Annotated[list[JsonValue], Field(max_length=0)] | None = None


class ToolUse(Body):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, JsonValue]
    cache_control: CacheControl | None = None
    caller: None = None
    toolset_name: None = None


def _blocks(content: Any) -> Any:
    """A text alone is a block of it."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Texts: TypeAlias = Annotated[list[TextBlock], BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock])]


class ToolResult(Body):
    """What a tool that was called gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = Field(default_factory=list)
    is_error: bool = False
    cache_control: CacheControl | None = None


Block: TypeAlias = Annotated[TextBlock | ToolUse | ToolResult, Field(discriminator="type")]


class BlockTurn(Body):
    """A turn of a conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[
        list[Block],
        Field(min_length=1),
        BeforeValidator(_blocks, json_schema_input_type=str | Annotated[list[Block], Field(min_length=1)]),
    ]

    @model_validator(mode="after")
    def _check(self) -> BlockTurn:
        wrong = "tool_result" if self.role == "assistant" else "tool_use"
        if any(one.type == wrong for one in self.content):
            raise ValueError(f"a {wrong} is not for the {self.role} to say")
        return self


class InputTool(Body):
    """A function that may be called. Its arguments satisfy the schema, whether `strict` or not."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    input_schema: dict[str, JsonValue]
    strict: bool | None = None
    cache_control: CacheControl | None = None


class Choosing(Body):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _check(self) -> Choosing:
        if (self.name is not None) != (self.type == "tool"):
            raise ValueError("name goes with type: tool, and with no other")
        return self


class Thinking(Body):
    """There is none here."""

    type: Literal["disabled"]


class Whose(Body):
    user_id: str | None = None
    """Texts of one user are read for themselves: what one asked makes nothing faster for another."""


class CountRequest(Body):
    """What /v1/messages/count_tokens takes: what is read of a request."""

    model: str
    messages: Annotated[list[BlockTurn], Field(min_length=1)]
    system: Texts | None = None
    tools: list[InputTool] | None = None
    tool_choice: Choosing | None = None
    thinking: Thinking | None = None
    cache_control: CacheControl | None = None

    @model_validator(mode="after")
    def _check(self) -> CountRequest:
        if self.messages[-1].role == "assistant":
            raise ValueError(
                "messages: the last turn is the assistant's, and this server begins a turn of its own; leave it out"
            )
        if self.tool_choice is not None and self.tool_choice.type in ("any", "tool") and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self


class MessagesRequest(CountRequest):
    """What /v1/messages takes."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] = Field(
        default_factory=list
    )
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(gt=0)] | None = None
    metadata: Whose | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def sampling(self) -> dict[str, Any]:
        """The engine's settings. At temperature 0 nothing is drawn, so that top_p and top_k say nothing."""
        found: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.temperature > 0:
            found |= {} if self.top_p in (None, 1) else {"top_p": self.top_p}
            found |= {} if self.top_k is None else {"top_k": self.top_k}
        if self.stop_sequences:
            found["stop"] = self.stop_sequences
        return found


def question_of(body: CountRequest) -> dict[str, Any]:
    """The turns, and the tools, as the engine takes them."""
    turns = [] if not body.system else [{"role": "system", "content": _joined(body.system)}]
    for turn in body.messages:
        turns += _turns(turn)
    asked: dict[str, Any] = {"messages": turns}
    if body.tools:
        choice = body.tool_choice or Choosing(type="auto")
        asked["tools"] = [
            {"type": "function", "function": {"name": one.name, "parameters": one.input_schema}
             | ({} if one.description is None else {"description": one.description})}
            for one in body.tools
        ]  # fmt: skip
        asked["choice"] = choice.name if choice.type == "tool" else {"any": "required"}.get(choice.type, choice.type)
        asked["parallel"] = not choice.disable_parallel_tool_use
    return asked


def _turns(turn: BlockTurn) -> list[dict[str, Any]]:
    """Each result of a tool is a turn of its own, before what the user says in the same one."""
    found: list[dict[str, Any]] = []
    for one in turn.content:
        if isinstance(one, ToolResult):
            # A turn of a tool says nothing but its text.
            text = ("Error: " if one.is_error else "") + _joined(one.content)
            found.append({"role": "tool", "tool_call_id": one.tool_use_id, "content": text})
    texts = [one for one in turn.content if isinstance(one, TextBlock)]
    calls = [
        {
            "id": one.id,
            "type": "function",
            "function": {"name": one.name, "arguments": json.dumps(one.input, ensure_ascii=False)},
        }
        for one in turn.content
        if isinstance(one, ToolUse)
    ]
    if texts or calls:
        found.append({"role": turn.role, "content": _joined(texts), **({"tool_calls": calls} if calls else {})})
    return found


def _joined(texts: list[TextBlock]) -> str:
    return "\n".join(one.text for one in texts)
