"""Text out of a model: all of it, or as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.core.types import Completion, Message
from luthier.engine.engine import STREAMS, Engine, numbers_of
from luthier.engine.padded import write, write_on
from luthier.engine.pieces import complete, pieces
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling
from luthier.models.pages import BLOCK, writes_by_pages
from luthier.models.spec import LoadedModel


def generate(
    model: LoadedModel,
    prompts: Sequence[str | Sequence[Message]],
    sampling: Sampling | None = None,
    *,
    raw: bool = False,
    batch_size: int = STREAMS,
    keys: Sequence[str] | None = None,
    tools: Sequence[Sequence[dict[str, Any]]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """One completion for each prompt (a text, or messages), in order; `batch_size` of them at once.

    `raw` goes on from the text as it stands, without the chat template; `tools` are what each prompt may call. By the
    engine an answer is that of its prompt alone, and one that is drawn depends on the seed and its key (by default its
    place among the prompts). Beams, encoder-decoders and families that it cannot read are padded side by side
    (`engine.padded`): the same greedy answers, slower, and drawn ones repeat for the same batch only. Raises ModelError
    for models that write no text.
    """
    sampling = sampling or Sampling()
    _check(model)
    held = tools or [()] * len(prompts)
    encoded = [model.renderer.prompt(prompt, own, raw=raw) for prompt, own in zip(prompts, held, strict=True)]
    if not uses_engine(model, sampling):
        return _generate_padded(model, encoded, sampling, batch_size, on_progress)
    engine = engine_for(model, [len(ids) for ids in encoded], sampling.max_tokens, batch_size)
    requests = [
        engine.add(ids, sampling, draw=None if sampling.seed is None else numbers_of(sampling.seed, key))
        for key, ids in zip(range(len(encoded)) if keys is None else keys, encoded)
    ]
    done = 0

    def count(found: list[Request]) -> None:
        nonlocal done
        ended = sum(one.finish is not None for one in found)
        done += ended
        if on_progress is not None and ended:
            on_progress(done, len(requests))

    engine.run(count)
    return [complete(model, one.written, sampling, len(one.prompt), one.finish == "stop") for one in requests]


def stream(
    model: LoadedModel,
    prompt: str | Sequence[Message],
    sampling: Sampling | None = None,
    *,
    raw: bool = False,
    engine: Engine | None = None,
) -> Iterator[str]:
    """The answer in pieces as it is written: whole characters only, and nothing of a stop text.

    Leaving the iterator ends the writing at the next token. `engine` is used in place of one made for this answer, so that
    a prompt that begins like an earlier one is not read again. Raises ConfigError for beam search, which has no order to
    stream in.
    """
    sampling = sampling or Sampling()
    _check(model)
    if sampling.beams > 1:
        raise ConfigError("beam search knows its answer only at the end and cannot be streamed; set beams: 1")
    ids = model.renderer.prompt(prompt, raw=raw)
    if not uses_engine(model, sampling):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        yield from pieces(model, write_on(model, ids, sampling), sampling)
        return
    engine = engine or engine_for(model, [len(ids)], sampling.max_tokens)
    yield from pieces(model, _tokens(engine, ids, sampling), sampling)


def uses_engine(model: LoadedModel, sampling: Sampling) -> bool:
    """Whether answers come from the engine, not from transformers' own loop."""
    return sampling.beams == 1 and writes_by_pages(model)


def tell_engine(model: LoadedModel, sampling: Sampling, events: Events) -> None:
    """Say by which way answers come, and why."""
    if uses_engine(model, sampling):
        events.choose("engine", "paged", "texts come and go; each is written as if it were alone")
        return
    why = (
        f"{model.spec.family} models do not read texts laid end to end"
        if sampling.beams == 1
        else "beams are searched there"
    )
    events.choose("engine", "padded", f"transformers' own loop, side by side with padding: {why}")


def engine_for(model: LoadedModel, lengths: Sequence[int], max_tokens: int, streams: int = STREAMS) -> Engine:
    """An engine with room for the longest `streams` prompts of these lengths and their answers at once."""
    return Engine(model, room_for(model, lengths, max_tokens, streams), streams=streams)


def room_for(model: LoadedModel, lengths: Sequence[int], max_tokens: int, streams: int) -> int:
    """Tokens that the longest `streams` prompts of these lengths and their answers take."""
    whole = sorted((min(length + max_tokens, model.spec.max_length) + BLOCK for length in lengths), reverse=True)
    return sum(whole[:streams]) or BLOCK


def _tokens(engine: Engine, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
    draw = None if sampling.seed is None else numbers_of(sampling.seed, 0)
    request, seen = engine.add(ids, sampling, draw=draw), 0
    try:
        while request.finish is None:
            engine.step()
            yield from request.written[seen:]
            seen = len(request.written)
    finally:
        engine.abort(request)


def _generate_padded(
    model: LoadedModel,
    encoded: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[Completion]:
    """Prompts of like length share a batch, padded on the left with the mask set."""
    order = sorted(range(len(encoded)), key=lambda at: len(encoded[at]))
    found: dict[int, Completion] = {}
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        for at, ids in zip(part, write(model, [encoded[at] for at in part], sampling)):
            found[at] = complete(model, ids, sampling, len(encoded[at]))
        if on_progress is not None:
            on_progress(min(start + batch_size, len(order)), len(order))
    return [found[at] for at in range(len(encoded))]


def _check(model: LoadedModel) -> None:
    if model.spec.task not in ("causal", "seq2seq"):
        raise ModelError(
            f"{model.spec.source}: this model is made to {model.spec.task} and writes no text; use a language model"
        )
