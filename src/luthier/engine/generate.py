"""Text out of a model: the reference backend, over transformers' own `generate`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from typing import Any

import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.core.types import Completion, Message
from luthier.engine.sampling import Sampling
from luthier.models.quiet import quiet
from luthier.models.spec import LoadedModel


def generate(
    model: LoadedModel,
    prompts: Sequence[str | Sequence[Message]],
    sampling: Sampling | None = None,
    *,
    raw: bool = False,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """One completion for each prompt (a text, or messages), in order.

    `raw` goes on from the text as it stands, without the chat template. Prompts of like length share a batch, padded
    on the left with the mask set, so greedy answers are those of each prompt alone. Drawing with a seed is
    reproducible for the same prompts and batch size. Raises ModelError for models that write no text.
    """
    sampling = sampling or Sampling()
    _check(model)
    encoded = [model.renderer.prompt(prompt, raw=raw) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda at: len(encoded[at]))
    found: dict[int, Completion] = {}
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = [encoded[at] for at in part]
        written = write(model, rows, sampling)
        for at, ids in zip(part, written):
            found[at] = _complete(model, ids, sampling, len(encoded[at]))
        if on_progress is not None:
            on_progress(min(start + batch_size, len(order)), len(order))
    return [found[at] for at in range(len(prompts))]


def stream(
    model: LoadedModel, prompt: str | Sequence[Message], sampling: Sampling | None = None, *, raw: bool = False
) -> Iterator[str]:
    """The answer in pieces as it is written: whole characters only, and nothing of a stop text.

    Leaving the iterator ends the writing at the next token. Raises ConfigError for beam search, which has no order
    to stream in.
    """
    sampling = sampling or Sampling()
    _check(model)
    if sampling.beams > 1:
        raise ConfigError("beam search knows its answer only at the end and cannot be streamed; set beams: 1")
    ids = model.renderer.prompt(prompt, raw=raw)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    queue: Queue[int | BaseException | None] = Queue()
    left = threading.Event()

    class Tap:
        """What `generate` hands each new token to; the first call brings the prompt."""

        def __init__(self) -> None:
            self.first = True

        def put(self, value: torch.Tensor) -> None:
            if self.first:
                self.first = False
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
        yield from _pieces(model, queue, sampling)
    finally:
        left.set()
        thread.join()


class _Left(Exception):
    """The reader of a stream went away."""


def _pieces(model: LoadedModel, queue: Queue[Any], sampling: Sampling) -> Iterator[str]:
    """Text to show so far, piece by piece: a half character or the beginning of a stop text is held back."""
    written: list[int] = []
    shown = 0
    while True:
        token = queue.get()
        if isinstance(token, BaseException):
            raise token
        done = token is None or token in model.spec.stop_ids
        if not done:
            written.append(token)
        text = model.renderer.decode(written)
        cut = _find_stop(text, sampling.stop)
        if cut is not None:
            text, done = text[:cut], True
        elif not done:
            held = next(
                (
                    size
                    for size in range(len(text), 0, -1)
                    if any(one.startswith(text[-size:]) for one in sampling.stop)
                ),
                0,
            )
            text = text[: len(text) - held]
            text = text.rstrip("\ufffd")
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if done:
            return


def _check(model: LoadedModel) -> None:
    if model.spec.task not in ("causal", "seq2seq"):
        raise ModelError(
            f"{model.spec.source}: this model is made to {model.spec.task} and writes no text; use a language model"
        )


@torch.no_grad()
def write(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    streamer: Any = None,
    processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> list[list[int]]:
    """New ids of each row, from the model's own `generate`; after a row's stop token anything may follow.

    `processor` makes the scores [S, V] of the next token anew, given the ids [S, T] so far.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

    module, spec = model.module, model.spec
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
    room = spec.max_length - width if left else spec.max_length
    settings: dict[str, Any] = {
        "max_new_tokens": max(1, min(sampling.max_tokens, room)),
        "do_sample": sampling.temperature > 0,
        "num_beams": sampling.beams,
        "repetition_penalty": sampling.repetition_penalty,
        "pad_token_id": pad,
        "eos_token_id": list(spec.stop_ids) or None,
        "decoder_start_token_id": getattr(module.config, "decoder_start_token_id", None),
        "use_cache": True,
    }
    if sampling.temperature > 0:
        settings |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "min_p": sampling.min_p,
        }
    stops = StoppingCriteriaList([StopStringCriteria(model.tokenizer, list(sampling.stop))] if sampling.stop else [])
    training, forced = module.training, module.generation_config.forced_eos_token_id
    module.eval()
    # BART and Marian write their end token wherever max_tokens cuts: an answer that was cut would look finished.
    module.generation_config.forced_eos_token_id = None
    try:
        with quiet():
            out = module.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=GenerationConfig(**settings),
                stopping_criteria=stops,
                logits_processor=LogitsProcessorList([processor] if processor else []),
                streamer=streamer,
            )
    finally:
        module.train(training)
        module.generation_config.forced_eos_token_id = forced
    return [row.tolist() for row in (out[:, width:] if left else out[:, 1:]).cpu()]


def _complete(model: LoadedModel, ids: list[int], sampling: Sampling, prompt_tokens: int) -> Completion:
    end = next((at for at, token in enumerate(ids) if token in model.spec.stop_ids), None)
    kept = ids if end is None else ids[:end]
    text = model.renderer.decode(kept)
    cut = _find_stop(text, sampling.stop)
    if cut is not None:
        text = text[:cut]
    finish = "stop" if end is not None or cut is not None else "length"
    return Completion(text, tuple(kept), finish, prompt_tokens)  # type: ignore[arg-type]


def _find_stop(text: str, stops: Sequence[str]) -> int | None:
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found) if found else None
