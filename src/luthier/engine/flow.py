"""Rows of a file through one engine: the next is taken up as soon as any is done, and answers come in the rows' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from luthier.core.types import Completion
from luthier.engine.engine import Engine
from luthier.engine.generate import add_answer, by_prompt, completed, room_for
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling
from luthier.models.spec import LoadedModel

# Rows that are held for each text that runs, done or not: a long answer keeps those behind it from being handed on, and is
# not waited for until so many are.
AHEAD = 32


def write_in_order(
    model: LoadedModel,
    prompts: Iterable[tuple[object, Sequence[int]]],
    sampling: Sampling,
    *,
    room: int,
    streams: int,
) -> Iterator[list[Completion]]:
    """The answers to prompts (each a key and its ids), in order: those that are ready after a step. They are what
    `engine.generate.generate` writes for the same keys.

    Prompts are taken one by one as there is room for them, so that no more than a window of them is held. `room` is how many
    tokens are kept, `streams` how many texts run at once. Raises the error that an answer ended with, after all before it
    were handed on.
    """
    engine, left = Engine(model, room, streams=streams), iter(prompts)
    held: deque[list[Request]] = deque()
    unfinished = 0
    while True:
        # As many wait as run, so that a place that becomes free is taken at once.
        while unfinished < 2 * streams and len(held) < AHEAD * streams and (found := next(left, None)) is not None:
            key, ids = found
            held.append([add_answer(engine, ids, sampling, key, which) for which in range(sampling.n)])
            unfinished += sampling.n
        if not held:
            return
        unfinished -= sum(one.finish is not None for one in engine.step())
        ready, error = list[Completion](), None
        while held and error is None and all(one.finish is not None for one in held[0]):
            answers = held.popleft()
            error = next((one.error for one in answers if one.error is not None), None)
            if error is None:
                ready += by_prompt([completed(model, one, sampling) for one in answers], sampling.n)
        if ready:
            yield ready
        if error is not None:
            raise error


def room_in_order(model: LoadedModel, lengths: Sequence[int], sampling: Sampling, streams: int) -> int:
    """Tokens that are kept for prompts of these lengths, in order: what the longest of those take that run side by side, as
    long as none takes much longer than its neighbours; then some are read anew."""
    each = max(1, streams // sampling.n)
    starts = range(0, max(1, len(lengths)), each)
    return max(
        room_for(
            model, [one for one in lengths[at : at + each] for _ in range(sampling.n)], sampling.max_tokens, streams
        )
        for at in starts
    )
