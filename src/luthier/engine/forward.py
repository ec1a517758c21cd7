"""A step through the model: the tokens of many texts at once, and less of them where memory runs out."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from luthier.engine.choose import takes_likeliest
from luthier.engine.logs import prompt_logs, tops
from luthier.engine.reader import Reader
from luthier.engine.request import Request
from luthier.engine.schedule import Schedule
from luthier.engine.seats import Seats
from luthier.engine.structure import masks_made
from luthier.engine.tide import Tide, first_whole, halved
from luthier.models.memory import out_of_memory, return_freed_memory
from luthier.models.spec import LoadedModel

# Ends a text with what went wrong with it.
Fail: TypeAlias = Callable[[Request, Exception], None]


class Forward:
    """Reads what a schedule planned."""

    def __init__(self, model: LoadedModel, reader: Reader, schedule: Schedule | Seats):
        self._model, self._reader, self._schedule = model, reader, schedule
        self._apart = model.spec.kind == "encoder-decoder"
        self._tide = Tide(schedule.tokens)

    def read(self, planned: list[tuple[Request, int]], fail: Fail) -> tuple[Tensor, dict[Request, int]]:
        """Read a step: the logits (or the likeliest tokens) of the texts that are read to their end, and the first row of each.

        Where memory runs out, the first half of it is read, and from then on no more than that at once, until memory was enough
        for long (`tide.Tide`).
        """
        size = sum(count for _, count in planned)
        try:
            found = self._put_through(planned, fail)
            self._rise()
            return found
        except Exception as err:
            traceback.clear_frames(err.__traceback__)
            error, again = err, out_of_memory(err) and size > 1
        # Where several processes read, the others wait for this one in the middle of a step.
        again = again and not (self._apart and len(planned) == 1) and self._model.parts == 1
        if again:
            return_freed_memory(self._model.device)
            planned = first_whole(planned, size // 2) if self._apart else halved(planned, size // 2)
            self._tide.fall(size // 2)
            self._schedule.tokens = self._tide.tokens
            warnings.warn(
                f"memory ran out, so {size // 2} tokens go through the model at once from now on; the result is the same",
                stacklevel=3,
            )
            try:
                return self._put_through(planned, fail)
            except Exception as err:
                error = err
        for request, _ in planned:
            fail(request, error)
        return torch.empty(0), {}

    def _rise(self) -> None:
        """After many steps for which memory was enough, let more go through the model at once, up to what was asked for."""
        calm = self._tide.hold()
        if calm:
            self._schedule.tokens = self._tide.tokens
            warnings.warn(
                f"memory was enough for {calm} steps, so {self._tide.tokens} tokens go through the model at once again; the "
                "result is the same",
                stacklevel=4,
            )

    def _put_through(self, planned: Sequence[tuple[Request, int]], fail: Fail) -> tuple[Tensor, dict[Request, int]]:
        """Put a step through the model. Where no setting changes what is likeliest and that is asked for, the likeliest tokens
        alone."""
        ids: list[int] = []
        rows, told, first = list[int](), list[int](), dict[Request, int]()
        for request, count in planned:
            if request.sampling.prompt_logprobs:
                told += [len(ids) + place - request.read for place in request.telling(count)]
            drafts = len(request.drafts)
            end = request.read + count - drafts
            ids += request.ids(request.read, end)
            ids += request.drafts
            if end == request.length:
                first[request] = len(rows)
                rows += range(len(ids) - 1 - drafts, len(ids))
        requests = [request for request, _ in planned]
        likeliest = not told and all(takes_likeliest(one) for one in first)
        with masks_made(first):
            found = self._reader.read(
                ids, [one.table for one in requests], [one.read for one in requests], [count for _, count in planned],
                [*rows, *told], likeliest=likeliest, adapters=[one.adapter for one in requests],
            )  # fmt: skip
        at = len(rows)
        for request, count in planned:
            places = request.telling(count) if request.sampling.prompt_logprobs else range(0)
            start, at = at, at + len(places)
            try:
                if places:
                    following = request.prompt[places.start + 1 : places.stop + 1]
                    request.prompt_logs += prompt_logs(found[start:at], following)
                    if request.sampling.logprobs:
                        request.prompt_tops += tops(found[start:at], request.sampling.logprobs)
                self._schedule.advance(request, count - len(request.drafts))
            except Exception as err:
                fail(request, err)
        return found[: len(rows)], first
