"""How a language model is asked for one of several labels, and how their likelihoods become probabilities."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator

from luthier.core.config import Config


def _read(value: Any) -> Any:
    """`a,b` of the command line as two labels; numbers as they are written."""
    if isinstance(value, str):
        return [one.strip() for one in value.split(",")]
    if isinstance(value, list | tuple):
        if any(isinstance(one, bool) for one in value):
            raise ValueError(
                "a label is true or false, as YAML reads yes and no without quotes; put each label into quotes"
            )
        return [str(one) if isinstance(one, int | float) else one for one in value]
    return value


def _check(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(labels) == 1:
        raise ValueError("one label leaves nothing to choose; give two at least")
    if not all(one.strip() for one in labels):
        raise ValueError("a label is empty; give it a name")
    if len(set(labels)) < len(labels):
        raise ValueError("a label stands there twice; take one out")
    return labels


Labels: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_read), AfterValidator(_check)]


class Labelling(Config):
    """What a language model is asked, and how it answers: with the label that it finds likeliest after the text."""

    instruction: str | None = None
    """What stands before the text, and before worked examples; by default a question that names the labels."""
    per_token: bool = False
    """Compare labels by mean instead of summed log-probability of their tokens. The sum, with the end of the answer in it, is
    the probability of the whole label, and short labels have no advantage by it; the mean favours long words in pieces."""
    calibrate: bool = False
    """Divide the probability of a label by the one that it has where there is no text (Zhao et al. 2021, arXiv:2102.09690)."""
