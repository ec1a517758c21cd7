"""Answers by transformers' own `generate`, side by side with padding: for encoder-decoders, and for families that the engine
cannot read; and the reference for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from typing import Any

import torch

from luthier.core.errors import ConfigError
from luthier.engine.crossed import opening_of
from luthier.engine.likeliest import not_numbers
from luthier.engine.sampling import Sampling
from luthier.engine.structure import Restrict
from luthier.engine.terms import at_least, banned_of, check_terms, ends_of
from luthier.models.quiet import quiet
from luthier.models.spec import LoadedModel


@torch.no_grad()
def write(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    streamer: Any = None,
    processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> list[list[int]]:
    """New ids of each row, from the model's own `generate`; after a row's stop token anything may follow.

    `processor` makes the scores [S, V] of the next token anew, given the ids [S, T] so far. Raises ConfigError for what
    transformers' loop does not give, and ModelError for logits that are not numbers.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    module, spec = model.module, model.spec
    refuse_logprobs(model, sampling)
    width = max(len(row) for row in rows)
    pad = model.tokenizer.pad_token_id
    pad = spec.stop_ids[0] if pad is None and spec.stop_ids else (pad or 0)
    left = spec.kind == "decoder"
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for at, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[at, place] = torch.tensor(row)
        mask[at, place] = 1
    room = at_least(max(1, min(sampling.max_tokens, spec.max_length - width if left else spec.max_length)), sampling)
    # What an encoder-decoder is made to begin with is no part of the answer.
    begun = 0 if left else max(0, len(opening_of(model)) - 1)
    start = width if left else 1 + begun
    training = module.training
    own: Any = module.generation_config
    forced, ending = own.forced_eos_token_id, own.eos_token_id
    module.eval()
    # BART and Marian write their end token wherever max_tokens cuts: an answer that was cut would look finished. And where
    # nothing is to end an answer, the model's own end tokens would be taken.
    own.forced_eos_token_id = own.eos_token_id = None
    try:
        with quiet():
            out = module.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=GenerationConfig(**_settings(model, sampling, room, begun, pad)),  # type: ignore[no-untyped-call]
                stopping_criteria=StoppingCriteriaList(_stops(model, sampling, start)),
                logits_processor=LogitsProcessorList(
                    [
                        _Processor(one)
                        for one in (*_processors(model, sampling, start), *([processor] if processor else []))
                    ]
                ),
                streamer=streamer,
            )
    finally:
        module.train(training)
        own.forced_eos_token_id, own.eos_token_id = forced, ending
    return [row.tolist() for row in out[:, start:].cpu()]


class _Processor:
    """One that transformers calls at each token. It asks each time which arguments that takes, and an object says so in a tenth
    of the time of a plain function."""

    def __init__(self, make: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        self.make = make

    def __call__(self, ids_ST: torch.Tensor, scores_SV: torch.Tensor) -> torch.Tensor:
        return self.make(ids_ST, scores_SV)


def refuse_logprobs(model: LoadedModel, sampling: Sampling) -> None:
    """Raises ConfigError where log-probabilities are asked for."""
    for name, asked in (("logprobs", sampling.logprobs is not None), ("prompt_logprobs", sampling.prompt_logprobs)):
        if asked:
            raise ConfigError(
                f"{name}: {model.spec.family} models are written by transformers' own loop, which does not give them here; "
                "leave it out"
            )


def _settings(model: LoadedModel, sampling: Sampling, room: int, begun: int, pad: int) -> dict[str, Any]:
    """Of transformers' GenerationConfig."""
    check_terms(model, sampling)
    banned = [list(form) for form in banned_of(model, sampling)]
    settings: dict[str, Any] = {
        "max_new_tokens": room + begun,
        "min_new_tokens": sampling.min_tokens + begun if sampling.min_tokens else None,
        "do_sample": sampling.temperature > 0,
        "num_beams": sampling.beams,
        "num_return_sequences": sampling.n if sampling.beams > 1 else 1,
        "length_penalty": sampling.length_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "sequence_bias": [[[token], float(added)] for token, added in sampling.logit_bias.items()] or None,
        "bad_words_ids": banned or None,
        "pad_token_id": pad,
        "eos_token_id": list(ends_of(model, sampling)) or None,
        "decoder_start_token_id": getattr(model.module.config, "decoder_start_token_id", None),
        "use_cache": True,
    }
    if sampling.temperature > 0:
        settings |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "min_p": sampling.min_p,
            "typical_p": 1.0 if sampling.typical_p is None else sampling.typical_p,
        }
    return settings


def _stops(model: LoadedModel, sampling: Sampling, start: int) -> list[Callable[..., torch.Tensor]]:
    """Stop texts, once the least tokens are written."""
    from transformers import StopStringCriteria

    if not sampling.stop:
        return []
    whole = StopStringCriteria(model.tokenizer, list(sampling.stop))

    def ends(ids_ST: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
        found_S: torch.Tensor = whole(ids_ST, scores, **rest)
        return found_S & (ids_ST.shape[1] - start >= sampling.min_tokens)

    return [ends]


def _processors(
    model: LoadedModel, sampling: Sampling, start: int
) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """What transformers lacks: scores that are no numbers are refused, then answers of a structure, and penalties of presence
    and frequency."""
    if sampling.structure is None:
        return [_check_numbers, *_penalties(sampling, start)]
    return [_check_numbers, Restrict(model, sampling.structure, start), *_penalties(sampling, start)]


def _check_numbers(ids_ST: torch.Tensor, scores_SV: torch.Tensor) -> torch.Tensor:
    """Raises ModelError for scores that are not numbers."""
    if not (scores_SV.amax(-1) < torch.inf).all():
        raise not_numbers()
    return scores_SV


def _penalties(sampling: Sampling, start: int) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Of presence and frequency, which transformers lacks."""
    if not sampling.presence_penalty and not sampling.frequency_penalty:
        return []

    def penalise(ids_ST: torch.Tensor, scores_SV: torch.Tensor) -> torch.Tensor:
        written_SW = ids_ST[:, start:]
        counts_SV = torch.zeros_like(scores_SV).scatter_add_(
            1, written_SW, torch.ones_like(written_SW, dtype=scores_SV.dtype)
        )
        lost_SV = counts_SV * sampling.frequency_penalty + (counts_SV > 0) * sampling.presence_penalty
        return scores_SV - lost_SV

    return [penalise]


def write_on(model: LoadedModel, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """New ids of one row as they come. Leaving the iterator ends the writing at the next token."""
    queue: Queue[int | BaseException | None] = Queue()
    left = threading.Event()

    class Tap:
        """What `generate` hands each new token to, after the prompt."""

        def __init__(self) -> None:
            # The prompt, and what an answer is made to begin with.
            self.skipped = 1 if model.spec.kind == "decoder" else max(1, len(opening_of(model)))

        def put(self, value: torch.Tensor) -> None:
            if self.skipped:
                self.skipped -= 1
                return
            if left.is_set():
                raise _Left
            for token in value.flatten().tolist():
                queue.put(int(token))

        def end(self) -> None:
            return

    def work() -> None:
        try:
            write(model, [ids], sampling, streamer=Tap())
            queue.put(None)
        except _Left:
            queue.put(None)
        except BaseException as err:
            queue.put(err)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (token := queue.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            yield token
    finally:
        left.set()
        thread.join()


class _Left(Exception):
    """The reader of a stream went away."""
