"""What every request that writes may say about how: OpenAI's fields, and the engine's own."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticUndefined

TokenId = Annotated[int, Field(ge=0)]


def _let_be_null(schema: dict[str, Any]) -> None:
    """Say in a schema that null may stand for what has a default."""
    required = schema.get("required", ())
    for name, one in schema.get("properties", {}).items():
        if name not in required and one.get("default") is not None and {"type": "null"} not in one.get("anyOf", ()):
            said = {key: one.pop(key) for key in ("default", "title", "description") if key in one}
            schema["properties"][name] = {"anyOf": [one, {"type": "null"}], **said}


class Body(BaseModel):
    """The body of a request: what is not known is refused, and nothing is taken for what it is not: "3", 3.0 and true are no
    integers. OpenAI's clients send null for what nobody said: that is the default."""

    model_config = ConfigDict(
        strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, json_schema_extra=_let_be_null
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        # Where null is a value of its own, it stays one.
        unsaid = {one.alias or name for name, one in cls.model_fields.items()
                  if one.default is not PydanticUndefined and NoneType not in get_args(one.annotation)}  # fmt: skip
        return {name: value for name, value in sent.items() if value is not None or name not in unsaid}


class Drawing(Body):
    """How the next token is chosen, and when to stop."""

    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = None
    user: str | None = None
    """Texts of one user are read for themselves: what one asked makes nothing faster for another."""

    top_k: Annotated[int, Field(gt=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    banned: list[str] | None = None
    """Texts that are not written."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Of texts that wait, those of a higher one come first."""
    structure: dict[str, JsonValue] | None = None
    """The form of the answer, as for `generate`: one of json_schema, regex, choices and grammar."""
    use_beam_search: bool = False
    """Search for the `n` likeliest answers with as many beams, instead of drawing any."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    """Of a beam search: above 1 favours long answers, below it short ones."""

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if self.use_beam_search and getattr(self, "stream", False):
            raise ValueError(
                "a beam search knows its answers only at the end, so they cannot be streamed; ask without stream"
            )
        if self.length_penalty is not None and not self.use_beam_search:
            raise ValueError("length_penalty needs use_beam_search: true")
        return self

    def sampling(self, max_tokens: int | None) -> dict[str, Any]:
        """The engine's settings. At temperature 0 nothing is drawn, so that what says how to draw has no meaning and is left
        out."""
        temperature = self.temperature
        if self.use_beam_search and "temperature" not in self.model_fields_set:
            temperature = 0.0
        found: dict[str, Any] = {
            "temperature": temperature,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "ignore_stop": self.ignore_eos,
            "n": self.n,
        }
        if max_tokens is not None:
            found["max_tokens"] = max_tokens
        if self.use_beam_search:
            # One beam goes where the likeliest token leads, as all writing at temperature 0 does.
            found["beams"] = self.n
        if self.length_penalty is not None and self.n > 1:
            found["length_penalty"] = self.length_penalty
        if temperature > 0:
            drawn = {"top_k": self.top_k, "min_p": self.min_p, "typical_p": self.typical_p, "seed": self.seed}
            drawn["top_p"] = None if self.top_p == 1 else self.top_p
            found |= {name: value for name, value in drawn.items() if value is not None}
        if self.logit_bias:
            found["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        if self.stop:
            found["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.stop_token_ids:
            found["stop_ids"] = self.stop_token_ids
        if self.banned:
            found["banned"] = self.banned
        if self.structure is not None:
            found["structure"] = self.structure
        return found


class StreamOptions(Body):
    """What a stream holds beside the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    """A JSON schema, and its name."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type: json_schema needs json_schema, with the schema in json_schema.schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"json_schema goes with type: json_schema, not with {self.type}; leave one of the two out")
        return self

    def structure(self) -> dict[str, Any] | None:
        """The engine's. Every schema is kept to, whether that is asked for as `strict` or not."""
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.schema_
        return {"json_schema": schema if schema is not None else {"type": "object"}}


class PromptDetails(BaseModel):
    cached_tokens: int = 0
    """Tokens that need not be read again."""


class WrittenDetails(BaseModel):
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    """Guesses of the engine at what it was about to write, right and wrong."""


class Usage(BaseModel):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()
    completion_tokens_details: WrittenDetails = WrittenDetails()


def usage_of(usage: dict[str, int]) -> Usage:
    """Of what an engine counted."""
    return Usage(
        prompt_tokens=usage["prompt"],
        completion_tokens=usage["written"],
        total_tokens=usage["prompt"] + usage["written"],
        prompt_tokens_details=PromptDetails(cached_tokens=usage["reused"]),
        completion_tokens_details=WrittenDetails(
            accepted_prediction_tokens=usage["accepted"],
            rejected_prediction_tokens=usage["drafted"] - usage["accepted"],
        ),
    )
