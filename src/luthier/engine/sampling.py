"""How the next token is chosen, and when to stop."""

from __future__ import annotations

from pydantic import Field, model_validator

from luthier.core.config import Config
from luthier.engine.structure import Structure


class Sampling(Config):
    """Greedy by default. An impossible combination is an error, never ignored."""

    max_tokens: int = Field(128, gt=0)
    """Most tokens to write."""
    temperature: float = Field(0.0, ge=0)
    """0: always the likeliest token. Above: how freely to draw."""
    top_k: int | None = Field(None, gt=0)
    """Draw among so many likeliest tokens."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw among the likeliest tokens that hold this share of the probability."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Draw among tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1: tokens that occurred become less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    beams: int = Field(1, gt=0)
    """Beam search with so many beams."""
    seed: int | None = None
    """Seed of the draw."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    structure: Structure | None = None
    """The form of the answer: a JSON schema, a regex, choices or a grammar. max_tokens and stop may cut it unfinished."""

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        drawing = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p, "seed": self.seed}
        if self.temperature == 0:
            idle = [name for name, value in drawing.items() if value is not None]
            if idle:
                raise ValueError(
                    f"{idle[0]} has no effect at temperature 0, where nothing is drawn; set temperature above 0"
                )
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beams search for the likeliest text, temperature draws one; choose one of the two")
        if self.beams > 1 and self.structure is not None:
            raise ValueError("structure and beams do not go together; leave one of the two out")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty text, which would end every answer at once")
        return self
