"""How the next token is chosen, and when to stop."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from luthier.core.config import Config
from luthier.engine.structure import Structure

Execution: TypeAlias = Literal["auto", "model", "bfloat16", "int8", "int4"]
TokenId = Annotated[int, Field(ge=0)]


class Sampling(Config):
    """Greedy by default. An impossible combination is an error, never ignored."""

    max_tokens: int = Field(128, gt=0)
    """Most tokens to write."""
    min_tokens: int = Field(0, ge=0)
    """Before so many tokens are written no end token and no stop text ends the answer."""
    temperature: float = Field(0.0, ge=0)
    """0: always the likeliest token. Above: how freely to draw."""
    top_k: int | None = Field(None, gt=0)
    """Draw among so many likeliest tokens."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw among the likeliest tokens that hold this share of the probability."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Draw among tokens at least this share as likely as the likeliest."""
    typical_p: float | None = Field(None, gt=0, le=1)
    """Draw among the tokens whose information is nearest to what is expected, that hold this share of the probability
    (Meister et al. 2023, arXiv:2202.00666)."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1: tokens that occurred become less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Taken from the score of each token that was written, the prompt aside."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Taken from the score of each token as often as it was written, the prompt aside."""
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field({})
    """Added to the score of a token, by its id."""
    banned: tuple[str, ...] = ()
    """Texts that are not written, as the tokens in which the tokenizer writes them, with and without a space in front."""
    beams: int = Field(1, gt=0)
    """Beam search with so many beams."""
    length_penalty: float = Field(1.0, ge=-10, le=10)
    """How the answers of a beam search are compared: by the log-probability of their tokens, divided by their number to this
    power. 1: the mean; above, long answers are favoured, below, short ones."""
    n: int = Field(1, gt=0)
    """Answers to a prompt, each drawn for itself; or the likeliest that beams find."""
    seed: int | None = None
    """Seed of the draw."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_ids: tuple[TokenId, ...] = ()
    """Tokens that end the answer beside the model's own, by their ids; they are not part of it."""
    ignore_stop: bool = False
    """Go on past the model's own end tokens."""
    shown_ids: tuple[TokenId, ...] = ()
    """Special tokens that stand in the text of the answer, by their ids; all others are left out of it."""
    after: tuple[TokenId, ...] = ()
    """Last tokens of a text from which the answer goes on: its text is what it adds to that, with the space before its first
    word that decoders of SentencePiece drop."""
    logprobs: int | None = Field(None, ge=0)
    """Give the log-probability of each token, and of so many likeliest ones in its place."""
    prompt_logprobs: bool = False
    """Give the log-probability of each token of the prompt but the first."""
    structure: Structure | None = None
    """The form of the answer: a JSON schema, a regex, choices or a grammar. max_tokens and stop may cut it unfinished."""

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        drawing = {
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "seed": self.seed,
        }
        if self.temperature == 0:
            idle = [name for name, value in drawing.items() if value is not None]
            if idle:
                raise ValueError(
                    f"{idle[0]} has no effect at temperature 0, where nothing is drawn; set temperature above 0"
                )
            if self.n > 1 and self.beams == 1:
                raise ValueError(
                    f"{self.n} answers would all be the same at temperature 0, where nothing is drawn; set temperature above 0"
                )
        if self.beams > 1:
            if self.temperature > 0:
                raise ValueError("beams search for the likeliest text, temperature draws one; choose one of the two")
            if self.n > self.beams:
                raise ValueError(f"{self.beams} beams end with so many answers, and n is {self.n}; set beams higher")
            for name, asked in (("logprobs", self.logprobs is not None), ("prompt_logprobs", self.prompt_logprobs)):
                if asked:
                    raise ValueError(f"{name} are not given for a beam search; set beams: 1")
            if self.structure is not None:
                raise ValueError("structure and beams do not go together; leave one of the two out")
        elif self.length_penalty != 1:
            raise ValueError("length_penalty has no effect without a beam search; set beams above 1, or leave it out")
        if self.structure is not None and (self.ignore_stop or self.min_tokens):
            raise ValueError("a structure says itself when an answer may end; leave ignore_stop and min_tokens out")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty text, which would end every answer at once")
        if any(not text for text in self.banned):
            raise ValueError("banned holds an empty text, which would leave nothing to write")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, and max_tokens only {self.max_tokens}")
        if self.min_tokens and self.ignore_stop and not self.stop and not self.stop_ids:
            raise ValueError(
                "min_tokens has no effect with ignore_stop, where nothing ends an answer; set one of the two"
            )
        return self

    @property
    def beyond_text(self) -> str | None:
        """The setting that asks for more than one text; None where a text is all."""
        asked = {"n": self.n > 1, "logprobs": self.logprobs is not None, "prompt_logprobs": self.prompt_logprobs}
        return next((name for name, held in asked.items() if held), None)
