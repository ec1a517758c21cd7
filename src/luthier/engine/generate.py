"""Text out of a model: all of it, or as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.core.types import Completion, Message
from luthier.engine import remote
from luthier.engine.beams import search_each
from luthier.engine.crossed import why_padded
from luthier.engine.engine import STREAMS, Engine
from luthier.engine.learned import remember
from luthier.engine.logs import logs_of
from luthier.engine.native import prepare, refuse
from luthier.engine.numbers import numbers_of
from luthier.engine.padded import refuse_logprobs, write, write_on
from luthier.engine.pieces import complete, pieces
from luthier.engine.pooler import Reading
from luthier.engine.readers import writes_side_by_side
from luthier.engine.request import Request
from luthier.engine.sampling import Execution, Sampling
from luthier.models.memory import shown
from luthier.models.pages import page_size
from luthier.models.precision import cast_weights
from luthier.models.prepared import copied
from luthier.models.spec import LoadedModel
from luthier.models.varlen import PAGE, by_text


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
    """One completion for each prompt (a text, or messages), in order; `batch_size` texts at once. Where several answers to a
    prompt are asked for (`n`), the first holds the others.

    `raw` goes on from the text as it stands, without the chat template; `tools` are what each prompt may call. By the
    engine an answer is that of its prompt alone, and one that is drawn depends on the seed, its key (by default its place
    among the prompts) and which of the `n` it is. Families that it cannot read are padded side by side (`engine.padded`):
    the same greedy answers, slower, and drawn ones repeat for the same batch only. Raises ModelError for models that write
    no text. A model whose weights a server holds is written with there (`engine.remote`).
    """
    sampling = sampling or Sampling()
    _check(model)
    held = tools or [()] * len(prompts)
    encoded = [model.renderer.prompt(prompt, own, raw=raw) for prompt, own in zip(prompts, held, strict=True)]
    if model.server is not None:
        return remote.write(model, encoded, sampling, keys, on_progress)
    if not uses_engine(model):
        return _generate_padded(model, encoded, sampling, batch_size, on_progress)
    if sampling.beams > 1:
        searched = search_each(model, encoded, sampling, max(1, batch_size // sampling.beams), on_progress)
        return [searched_for(model, found, sampling, len(prompt)) for found, prompt in zip(searched, encoded)]
    lengths = [len(ids) for ids in encoded for _ in range(sampling.n)]
    engine = engine_for(model, lengths, sampling.max_tokens, batch_size)
    requests = [
        add_answer(engine, ids, sampling, key, which)
        for key, ids in zip(range(len(encoded)) if keys is None else keys, encoded, strict=True)
        for which in range(sampling.n)
    ]
    done = 0

    def count(found: list[Request | Reading]) -> None:
        nonlocal done
        ended = sum(one.finish is not None for one in found)
        done += ended
        if on_progress is not None and ended:
            on_progress(done, len(requests))

    engine.run(count)
    return by_prompt([completed(model, one, sampling) for one in requests], sampling.n)


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
    a prompt that begins like an earlier one is not read again. Raises ConfigError for what is not one text that grows.
    """
    sampling = sampling or Sampling()
    _check(model)
    trouble = why_not_streamed(sampling)
    if trouble is not None:
        raise ConfigError(trouble)
    ids = model.renderer.prompt(prompt, raw=raw)
    if model.server is not None:
        yield from remote.stream(model, ids, sampling)
        return
    if not uses_engine(model):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        yield from pieces(model, write_on(model, ids, sampling), sampling)
        return
    engine = engine or engine_for(model, [len(ids)], sampling.max_tokens)
    yield from pieces(model, _tokens(engine, ids, sampling), sampling)


def why_not_streamed(sampling: Sampling) -> str | None:
    """Why an answer cannot be shown as it is written; None where it can."""
    if sampling.beams > 1:
        return "beam search knows its answer only at the end and cannot be streamed; set beams: 1"
    beyond = sampling.beyond_text
    return f"{beyond}: a stream is one text alone; leave it out" if beyond else None


def uses_engine(model: LoadedModel) -> bool:
    """Whether answers come from the engine, not from transformers' own loop."""
    return model.server is None and writes_side_by_side(model)


def choose_engine(model: LoadedModel, sampling: Sampling, execution: Execution, events: Events) -> None:
    """Make a loaded model ready to write, and say by which way answers come, and why. Raises ConfigError as `prepare` does."""
    choose_reader(model, execution, events)
    tell_engine(model, sampling, events)


def choose_reader(model: LoadedModel, execution: Execution, events: Events) -> None:
    """Pack the weights of a loaded model where it can be read so, else bring them to the precision that it computes in by itself.
    Raises ConfigError as `prepare` does."""
    if model.parts > 1:
        if execution not in ("auto", "model"):
            raise ConfigError(
                f"execution: {execution} is for one process, and {model.parts} share the model; leave it out"
            )
        if not uses_engine(model):
            raise ModelError(
                f"{model.spec.source}: {model.parts} processes cannot share it: {model.spec.family} models do not read texts "
                "laid end to end; start it in one process"
            )
        events.choose("processes", str(model.parts), "each holds its heads and columns of every layer")
        remember(model)
    elif model.spec.kind == "decoder" and uses_engine(model):
        prepare(model, execution, events)
        remember(model)
    else:
        refuse(execution)
    if model.native is None and model.as_stored and by_text(model.device):
        # Weights in bf16 are what its attention takes, and what such a device is fast with.
        events.choose("weights", "bfloat16", "as the files have them")
    elif model.native is None and model.as_stored:
        cast_weights(model, "float32")
        # Its keys and values are twice as wide now.
        model.as_stored, model.pages = False, None


def tell_engine(model: LoadedModel, sampling: Sampling, events: Events) -> None:
    """Say by which way answers come, and why."""
    if model.server is not None:  # said when it was found
        return
    if uses_engine(model):
        if model.native is not None:  # said when it was chosen
            return
        if model.spec.kind == "encoder-decoder":
            why, size = "texts come and go; each has its source beside it", copied(model)
            if size:
                why = f"texts come and go; each has its source beside it; a copy of the weights takes {shown(size)}"
            events.choose("engine", "rows", why)
            return
        alone = "texts come and go; each is written as if it were alone"
        events.choose(
            "engine", "paged", alone if sampling.beams == 1 else "the texts of a search share what they have in common"
        )
        _tell_attention(model, events)
        return
    why = f"{model.spec.family} models do not read texts laid end to end"
    if model.spec.kind == "encoder-decoder":
        why = why_padded(model) or why
    events.choose("engine", "padded", f"transformers' own loop, side by side with padding: {why}")


def _tell_attention(model: LoadedModel, events: Events) -> None:
    """Say by what keys and values are read where that is not the kernel of the processor."""
    if model.plainly == ():
        singles = "steps of single tokens as CUDA graphs" if model.parts == 1 else "shared out, so not as CUDA graphs"
        events.choose("attention", "varlen_attn", f"over pages of {PAGE} tokens; {singles}")
    elif model.plainly is not None:
        why = f"text by text, slower: varlen_attn is not for {', '.join(model.plainly)}"
        events.choose("attention", "plain torch", why)


def tell_guesses(written: Sequence[Completion], events: Events) -> None:
    """Say how much of what was written had been guessed right, and how many tokens a pass gave a text."""
    drafted, accepted = sum(one.drafted for one in written), sum(one.accepted for one in written)
    tokens = sum(len(one.ids) for one in written)
    if accepted:
        a_pass = tokens / max(1, tokens - accepted)
        events.choose("guesses", f"{accepted} of {drafted} right", f"{a_pass:.2f} tokens a pass")


def engine_for(model: LoadedModel, lengths: Sequence[int], max_tokens: int, streams: int = STREAMS) -> Engine:
    """An engine with room for the longest `streams` prompts of these lengths and their answers at once."""
    return Engine(model, room_for(model, lengths, max_tokens, streams), streams=streams)


def room_for(model: LoadedModel, lengths: Sequence[int], max_tokens: int, streams: int) -> int:
    """Tokens that the longest `streams` prompts of these lengths and their answers take."""
    most, size = model.spec.max_length, page_size(model)
    if model.spec.kind == "encoder-decoder":
        whole = sorted((length + min(max_tokens, most) + size for length in lengths), reverse=True)
    else:
        whole = sorted((min(length + max_tokens, most) + size for length in lengths), reverse=True)
    return sum(whole[:streams]) or size


def add_answer(
    engine: Engine,
    ids: Sequence[int],
    sampling: Sampling,
    key: object = 0,
    which: int = 0,
    *,
    priority: int = 0,
    salt: str = "",
    tenant: str = "",
    adapter: str = "",
    expected: Sequence[int] = (),
) -> Request:
    """One of the answers to a prompt. What is said of the prompt itself the first finds out."""
    one = sampling.model_copy(update={"n": 1, "prompt_logprobs": sampling.prompt_logprobs and which == 0})
    # The first keeps the numbers that a seed gives to a single answer.
    draw = None if sampling.seed is None else numbers_of(sampling.seed, key, *([which] if which else []))
    return engine.add(
        ids, one, draw=draw, priority=priority, salt=salt, tenant=tenant, adapter=adapter, expected=expected
    )


def completed(model: LoadedModel, request: Request, sampling: Sampling) -> Completion:
    """What a text that is finished became."""
    found = complete(model, request.written, sampling, len(request.prompt), request.finish == "stop")
    found = replace(found, drafted=request.drafted, accepted=request.accepted)
    if sampling.logprobs is not None:
        found = replace(found, logprobs=logs_of(model, request, len(found.ids)))
    if request.sampling.prompt_logprobs:
        top = tuple(tuple(one) for one in request.prompt_tops)
        found = replace(found, prompt_logprobs=tuple(request.prompt_logs), prompt_top=top)
    return found


def searched_for(model: LoadedModel, found: Sequence[Sequence[int]], sampling: Sampling, prompt: int) -> Completion:
    """The likeliest of the answers that a search ended with, which holds the `n` likeliest that there are."""
    made = [complete(model, ids, sampling, prompt) for ids in found[: sampling.n]]
    return replace(made[0], others=tuple(made[1:]))


def by_prompt(found: Sequence[Completion], n: int) -> list[Completion]:
    """The first answer to each prompt, which holds the others."""
    return [
        replace(found[at], others=tuple(found[at + 1 : at + n])) if n > 1 else found[at]
        for at in range(0, len(found), n)
    ]


def _tokens(engine: Engine, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
    request, seen = add_answer(engine, ids, sampling, 0), 0
    try:
        while request.finish is None:
            engine.step()
            if request.error is not None:
                raise request.error
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
    refuse_logprobs(model, sampling)
    # A search gives several answers to a prompt, all others one each.
    several = sampling.n if sampling.beams > 1 else 1
    encoded = [ids for ids in encoded for _ in range(sampling.n // several)]
    order = sorted(range(len(encoded)), key=lambda at: len(encoded[at]))
    found: dict[int, Completion] = {}
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        written = write(model, [encoded[at] for at in part], sampling)
        for place, at in enumerate(part):
            own = written[place * several : (place + 1) * several]
            made = [complete(model, ids, sampling, len(encoded[at])) for ids in own]
            found[at] = replace(made[0], others=tuple(made[1:]))
        if on_progress is not None:
            on_progress(min(start + batch_size, len(order)), len(order))
    return by_prompt([found[at] for at in range(len(encoded))], sampling.n // several)


def _check(model: LoadedModel) -> None:
    if model.spec.task not in ("causal", "seq2seq"):
        raise ModelError(
            f"{model.spec.source}: this model is made to {model.spec.task} and writes no text; use a language model"
        )
