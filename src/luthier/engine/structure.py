"""Answers of a given form: which tokens may come next, by llguidance."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import PrivateAttr, field_validator, model_validator
from torch import Tensor

from luthier.core.config import Config
from luthier.core.errors import ConfigError, MissingExtra, ModelError
from luthier.engine.digits import CallDigits, Digits, Vocabulary
from luthier.engine.schemas import blame, prepare, read_schema
from luthier.models.spec import LoadedModel
from luthier.native.masks import Mask, mask_rows_
from luthier.text.called import CallReader
from luthier.text.calls import CallForm

if TYPE_CHECKING:
    from luthier.engine.request import Request

# Between the parts of JSON: what json.dumps writes, indented or not. Without a bound a model could go on with blanks.
BLANKS = r"( |\n[ \t]{0,40})"
# Without \uXXXX: written so, a name that is in the schema would pass for another one.
WAYS = {"whitespace_pattern": BLANKS, "json_allowed_escapes": 'nrbtf\\"'}
KEPT = 64


class Structure(Config):
    """The form of an answer; exactly one of them is set.

    What is written so has this form, from its first character to its last, unless `max_tokens` or a stop text cuts it
    before it is whole. The prompt is no part of it.
    """

    json_schema: dict[str, Any] | bool | Path | None = None
    """A JSON schema, or the path of a file that holds one. The properties come in its order. A number has at most about 34
    digits in a row, unless its schema leaves nothing else: more tell nothing apart, and a model may never end them."""
    regex: str | None = None
    """A regular expression for the whole answer, in the syntax of Rust's regex crate, without look-around."""
    choices: tuple[str, ...] | None = None
    """The texts among which the answer is one."""
    grammar: str | None = None
    """A grammar in llguidance's form of Lark, with a rule `start`."""
    _reader: CallReader | None = PrivateAttr(None)

    def with_calls(self, form: CallForm, tools: Sequence[dict[str, Any]]) -> Structure:
        """This structure, whose answers hold calls of that form: the digits of their numbers are bounded as elsewhere."""
        self._reader = CallReader(form, tools)
        return self

    def digits(self, vocabulary: Vocabulary) -> Digits | None:
        """What bounds the digits of an answer; None where nothing tells a number from a text."""
        if self._reader is not None:
            return CallDigits(vocabulary, self._reader)
        return None if self.json_schema is None else Digits(vocabulary)

    @field_validator("json_schema", mode="after")
    @classmethod
    def _read(cls, value: Any) -> Any:
        found = read_schema(value) if isinstance(value, Path) else value
        if found is not None:
            prepare(found)
        return found

    @model_validator(mode="after")
    def _check(self) -> Structure:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            said = ", ".join(given) or "none"
            raise ValueError(f"set one of json_schema, regex, choices and grammar (got {said})")
        if (self.choices is not None and not all(self.choices)) or self.choices == ():
            raise ValueError("choices needs one text at least, and none that is empty")
        source_of(self)
        return self


class Matcher:
    """Where one answer is in its structure."""

    def __init__(
        self, state: Any, stop_ids: Sequence[int], width: int, ahead: bool = False, digits: Digits | None = None
    ):
        self._state, self._stop_ids, self._ahead, self._digits = state, stop_ids, ahead, digits
        self.mask: Mask = (ctypes.c_int32 * -(-width // 32))()
        self._place = ctypes.addressof(self.mask), ctypes.sizeof(self.mask)
        self.bits = np.frombuffer(memoryview(self.mask), dtype=np.int32)
        """A bit for each token, set where it may come next."""
        self.ready = False
        """Whether they are those of the place where it is."""
        self.error: Exception | None = None
        """Why they could not be made."""

    def copy(self) -> Matcher:
        """One at the same place, to go on from there apart from this one."""
        digits = None if self._digits is None else self._digits.copy()
        return Matcher(self._state.deep_copy(), self._stop_ids, 32 * len(self.mask), digits=digits)

    def fill(self) -> None:
        """Make the bits. Raises ModelError where the structure is too much for the machinery."""
        self._state.unsafe_compute_mask_ptr(*self._place)
        if self._state.is_error():
            raise ModelError(
                f"structure: the next token cannot be found ({_first(self._state.get_error())}); simplify it"
            )
        if self._digits is not None:
            self._digits.restrict(self.bits)

    def try_fill(self) -> None:
        """Make the bits, and keep what goes wrong."""
        try:
            self.fill()
        except Exception as err:
            self.error = err
        self.ready = True

    def take(self, token: int) -> bool:
        """Go on by a token that is no stop token; whether nothing more can follow it. `ahead`, the next bits are made at once,
        while what they are made of is at hand."""
        self.ready = False
        if not self._state.consume_token(token):
            raise nothing_left()
        if self._digits is not None:
            self._digits.take(token)
        stopped = bool(self._state.is_stopped())
        if self._ahead and not stopped:
            self.try_fill()
        return stopped


def matcher_for(model: LoadedModel, structure: Structure) -> Matcher:
    """One that has seen nothing yet. Raises ConfigError, MissingExtra, and ModelError for a tokenizer that it cannot read."""
    vocabulary, states = _compiled(model)
    # Where the model's own threads take every core, one more for masks would only stand in their way.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ahead = model.device.type == "cpu" and torch.get_num_threads() >= cores
    digits = structure.digits(vocabulary)
    state, width = states(source_of(structure)).deep_copy(), vocabulary.tokens.vocab_size
    return Matcher(state, model.spec.stop_ids, width, ahead, digits)


@contextmanager
def masks_made(requests: Iterable[Request]) -> Iterator[None]:
    """While this is entered, a thread finds what may come next in the texts that have a structure, where that was not found
    before; leaving waits for it. What goes wrong is kept in the matcher of the text."""
    matchers = [one.matcher for one in requests if one.matcher is not None and not one.matcher.ready]
    if not matchers:
        yield
        return
    made = _thread().submit(_fill, matchers)
    try:
        yield
    finally:
        made.result()


def _fill(matchers: Sequence[Matcher]) -> None:
    for one in matchers:
        one.try_fill()


def nothing_left() -> ConfigError:
    """What ends a text of which nothing more can be written."""
    return ConfigError(
        "structure: no token is left that both it and the other sampling settings allow; leave one of them out"
    )


def restrict(logits_RV: Tensor, requests: Sequence[Request]) -> None:
    """Leave the logits of what may come next in each text that has a structure; the others of its row become -inf."""
    rows = [at for at, one in enumerate(requests) if one.matcher is not None]
    if rows:
        mask_rows_(logits_RV, rows, [one.matcher.mask for one in requests if one.matcher is not None])


class Restrict:
    """The same for transformers' own `generate`: each row is followed from its place `start` at every token."""

    def __init__(self, model: LoadedModel, structure: Structure, start: int):
        if not model.spec.stop_ids:
            raise ConfigError("structure: this model has no stop token, so that no answer could end; use another")
        self._model, self._structure, self._start = model, structure, start

    def __call__(self, ids_ST: Tensor, scores_SV: Tensor) -> Tensor:
        if ids_ST.shape[1] < self._start:
            return scores_SV
        for at, row in enumerate(ids_ST[:, self._start :].tolist()):
            if not set(row) & set(self._model.spec.stop_ids):
                matcher = matcher_for(self._model, self._structure)
                for token in row:
                    matcher.take(token)
                matcher.fill()
                mask_rows_(scores_SV, [at], [matcher.mask])
        return scores_SV


def source_of(structure: Structure) -> str:
    """llguidance's own text of a structure. Raises ConfigError where it is none, or asks for what cannot be kept to."""
    made = _library().LLMatcher
    if structure.json_schema is not None:
        return _of_schema(json.dumps(structure.json_schema))
    if structure.regex is not None:
        source = made.grammar_from_regex(structure.regex)
    elif structure.choices is not None:
        words = "|".join(json.dumps(one, ensure_ascii=False) for one in structure.choices)
        source = made.grammar_from_lark(f"start:CHOICE\nCHOICE:{words}")
    else:
        source = made.grammar_from_lark(str(structure.grammar))
    mistake = _mistake(source)
    if mistake:
        name = "regex" if structure.regex is not None else "choices" if structure.choices is not None else "grammar"
        raise ConfigError(f"`{name}` cannot be followed ({mistake}); mend it")
    return str(source)


@lru_cache(KEPT)
def _of_schema(text: str) -> str:
    made, schema = _library().LLMatcher, prepare(json.loads(text))

    def translate(schema: dict[str, Any]) -> str:
        return str(made.grammar_from_json_schema(json.dumps(schema), overrides=WAYS))

    mistake = _mistake(translate(schema))
    if mistake:
        where, key = blame(schema, lambda other: not _mistake(translate(other)))
        raise ConfigError(
            f"{where}: `{key}` cannot be kept to while a text is written ({mistake}); leave it out, or say it otherwise"
        )
    return translate(schema)


@lru_cache(KEPT)
def _mistake(source: str) -> str:
    """What is wrong with a source, or only warned of: what is dropped is not kept to."""
    _, said = _library().LLMatcher.validate_grammar_with_warnings(source)
    # Tokens are looked up where there is a tokenizer, at the beginning of an answer.
    said = [one for one in said if not one.startswith("no tokenizer - can't validate <[")]
    return _first(said[0]) if said else ""


_TOKENIZERS: WeakKeyDictionary[Any, dict[tuple[int, ...], tuple[Vocabulary, Callable[[str], Any]]]] = (
    WeakKeyDictionary()
)


def _compiled(model: LoadedModel) -> tuple[Vocabulary, Callable[[str], Any]]:
    """The tokenizer as llguidance holds it, and what compiles for it; both are kept as long as the tokenizer is."""
    kept = _TOKENIZERS.setdefault(model.tokenizer, {})
    stops = tuple(model.spec.stop_ids)
    if stops not in kept:
        _library()
        from llguidance.hf import from_tokenizer

        try:
            tokens = from_tokenizer(model.tokenizer, eos_token=list(stops) or None)
        except ValueError as err:
            raise ModelError(
                f"{model.spec.source}: its tokenizer cannot be followed ({_first(str(err))}); leave structure out"
            ) from None
        kept[stops] = Vocabulary(tokens), lru_cache(KEPT)(lambda source: _state(tokens, source))
    return kept[stops]


def _state(tokens: Any, source: str) -> Any:
    """A beginning, of which each answer gets a copy."""
    state = _library().LLMatcher(tokens, source, log_level=0)
    first = state.deep_copy()
    first.compute_bitmask()
    if first.is_error():
        raise ConfigError(f"structure: no text can begin so ({_first(first.get_error())}); ask for one that can")
    return state


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtra("llguidance", "structure", "an answer of a given structure") from None
    return llguidance


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "masks")


def _first(text: str) -> str:
    """The first line of what llguidance says, which shows the place on further ones."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) < 160 else line[:160] + " ..."
