"""What the settings of a text mean in the tokens of one model: which end it, and which must not come."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.errors import ConfigError, DataError
from luthier.engine.crossed import opening_of
from luthier.engine.sampling import Sampling
from luthier.models.spec import LoadedModel


def ends_of(model: LoadedModel, sampling: Sampling) -> tuple[int, ...]:
    """Tokens that end an answer: the model's own, and those that were asked for."""
    own = () if sampling.ignore_stop else model.spec.stop_ids
    return tuple(dict.fromkeys((*own, *sampling.stop_ids)))


def banned_of(model: LoadedModel, sampling: Sampling) -> tuple[tuple[int, ...], ...]:
    """The tokens of each banned text: with a space in front and without, at the start of a text and inside.

    Raises ConfigError for a text that has no tokens, or that is one that ends an answer.
    """
    found: dict[tuple[int, ...], None] = {}
    for text in sampling.banned:
        bare = text.lstrip(" ") or text
        forms = [form for one in dict.fromkeys((text, bare, f" {bare}")) for form in _forms(model, one)]
        if not forms:
            raise ConfigError(f"banned: the tokenizer has no tokens for {text!r}, so it is not written; leave it out")
        ending = [form[0] for form in forms if len(form) == 1 and form[0] in ends_of(model, sampling)]
        if ending:
            raise ConfigError(f"banned: {text!r} is a token that ends an answer; set ignore_stop to go on past it")
        found.update(dict.fromkeys(forms))
    return tuple(found)


def check_terms(model: LoadedModel, sampling: Sampling) -> None:
    """Raises ConfigError for token ids that the model does not have."""
    vocabulary = model.vocabulary
    for name, ids in (("stop_ids", sampling.stop_ids), ("logit_bias", sampling.logit_bias)):
        strange = [token for token in ids if token >= vocabulary]
        if strange:
            raise ConfigError(f"{name}: there is no token {strange[0]}; the vocabulary has {vocabulary}, from 0 on")
    if sampling.logprobs is not None and sampling.logprobs > vocabulary:
        raise ConfigError(f"logprobs: {sampling.logprobs} tokens are asked for, and the vocabulary has {vocabulary}")
    if sampling.min_tokens and not sampling.stop and not ends_of(model, sampling):
        raise ConfigError(
            "min_tokens has no effect: this model has no end token; name one in stop_ids, or leave it out"
        )


def room_of(model: LoadedModel, prompt: Sequence[int], sampling: Sampling) -> int:
    """Most tokens of the answer to a prompt. Raises DataError for one that leaves no room."""
    if not prompt:
        raise DataError("a prompt needs one token at least")
    # The answer to a source has a context of its own.
    taken = max(0, len(opening_of(model)) - 1) if model.spec.kind == "encoder-decoder" else len(prompt)
    left = model.spec.max_length - taken
    if left < 1 or len(prompt) > model.spec.max_length:
        raise DataError(f"the prompt has {len(prompt)} tokens, and the context is {model.spec.max_length}; shorten it")
    return at_least(min(sampling.max_tokens, left), sampling)


def at_least(room: int, sampling: Sampling) -> int:
    """The room itself. Raises DataError where the least tokens do not fit into it."""
    if room < sampling.min_tokens:
        raise DataError(f"min_tokens is {sampling.min_tokens}, and the prompt leaves room for {room}; shorten it")
    return room


def _forms(model: LoadedModel, text: str) -> list[tuple[int, ...]]:
    """Its tokens alone, and after a line's end: tokenizers of SentencePiece put a space before the first word of a text."""

    def ids_of(one: str) -> tuple[int, ...]:
        return tuple(model.tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"])

    head, whole = ids_of("\n"), ids_of(f"\n{text}")
    inside = whole[len(head) :] if whole[: len(head)] == head else ()
    unknown = model.tokenizer.unk_token_id
    return [form for form in dict.fromkeys((ids_of(text), inside)) if form and unknown not in form]
