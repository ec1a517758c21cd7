"""Answers by transformers' own `generate`, side by side with padding: for beams, for encoder-decoders, and for families that
the engine cannot read; and the reference for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from typing import Any

import torch

from luthier.engine.sampling import Sampling
from luthier.engine.structure import Restrict
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
    processors = LogitsProcessorList([processor] if processor else [])
    if sampling.structure is not None:
        # What an encoder-decoder is made to begin with is no part of the answer.
        begun = module.generation_config.forced_bos_token_id is not None
        processors.insert(0, Restrict(model, sampling.structure, width if left else 1 + begun))
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
                logits_processor=processors,
                streamer=streamer,
            )
    finally:
        module.train(training)
        module.generation_config.forced_eos_token_id = forced
    return [row.tolist() for row in (out[:, width:] if left else out[:, 1:]).cpu()]


def write_on(model: LoadedModel, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """New ids of one row as they come. Leaving the iterator ends the writing at the next token."""
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
        while (token := queue.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            yield token
    finally:
        left.set()
        thread.join()


class _Left(Exception):
    """The reader of a stream went away."""
