"""One engine for everything that writes: texts that come and go share each pass through the model."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from luthier.core.errors import ConfigError, DataError, ModelError
from luthier.engine.blocks import Blocks
from luthier.engine.choose import choose
from luthier.engine.paged import Paged
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling
from luthier.engine.schedule import Schedule
from luthier.engine.scoring import Asked, Score, Scorer
from luthier.models.pages import BLOCK, writes_by_pages
from luthier.models.spec import LoadedModel

# Texts that run at once, and tokens that go through the model at once, where nobody says.
STREAMS, TOKENS = 32, 512


class Engine:
    """Writes with a decoder-only model, any number of texts at a time.

    `room` is how many tokens of all texts together are kept at most; what is read of a prompt is kept for others that
    begin alike. A step is: plan, read, write one token more of every text that is read to its end. On a CPU what a text
    becomes does not depend on the texts beside it, bit for bit. Raises ModelError for a model that cannot write so
    (`models.pages.writes_by_pages`).
    """

    def __init__(self, model: LoadedModel, room: int, *, streams: int = STREAMS, tokens: int = TOKENS):
        if not writes_by_pages(model):
            raise ModelError(f"{model.spec.source}: {model.spec.family} models do not write text by text side by side")
        self.model, self._arrived = model, 0
        blocks = -(-room // BLOCK)
        self._reader, self.blocks = Paged(model, blocks), Blocks(blocks)
        self.schedule = Schedule(self.blocks, streams, tokens)
        self._scorer = Scorer(model)

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        draw: Callable[[int], float] | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> Request:
        """A text to go on from, which waits until a step takes it up. `draw` gives the number for each place of the answer;
        without it one is drawn from the sampling's seed, or from chance.

        Raises DataError for a prompt that leaves no room, and ConfigError for settings that no step can follow.
        """
        if sampling.beams > 1:
            raise ConfigError("beams: this engine writes one answer at a time; set beams: 1")
        if not prompt:
            raise DataError("a prompt needs one token at least")
        left = self.model.spec.max_length - len(prompt)
        if left < 1:
            raise DataError(
                f"the prompt has {len(prompt)} tokens, and the context is {self.model.spec.max_length}; shorten it"
            )
        room = min(sampling.max_tokens, left)
        if len(prompt) + room > self.blocks.count * BLOCK:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens with {room} to write does not fit into {self.blocks.count * BLOCK} tokens, "
                "all that is kept; set max_tokens lower, or shorten the prompt"
            )
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        request = Request(tuple(prompt), sampling, room, self._arrived, draw or numbers_of(seed), priority, salt)
        self._arrived += 1
        self.schedule.waiting.append(request)
        return request

    def abort(self, request: Request) -> None:
        """End a text where it is; nothing happens to one that has ended."""
        if request.finish is None:
            request.finish = "abort"
            self.schedule.finish(request)

    @property
    def busy(self) -> bool:
        """Whether any text is not finished."""
        return bool(self.schedule.waiting or self.schedule.running)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """The texts that have one token more."""
        planned = self.schedule.plan()
        logits_RV, ready = self._read(planned)
        return self._commit(ready, choose(logits_RV, ready)) if ready else []

    def run(self, on_progress: Callable[[list[Request]], None] | None = None) -> None:
        """Step until every text is finished."""
        while self.busy:
            found = self.step()
            if on_progress is not None:
                on_progress(found)

    def score(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """How likely each continuation of the prompt is; what runs and waits is not touched. Raises DataError."""
        return self.score_all([(prompt, continuations)])[0]

    def score_all(self, asked: Sequence[Asked]) -> list[list[Score]]:
        """The same for many prompts at once; what they begin alike with is read once, and kept for the next call."""
        return self._scorer.score(asked)

    def _read(self, planned: Sequence[tuple[Request, int]]) -> tuple[torch.Tensor, list[Request]]:
        """Put a step through the model: the logits of the texts that are read to their end, and which they are."""
        ids: list[int] = []
        rows, ready = [], []
        for request, count in planned:
            ids += request.ids(request.read, request.read + count)
            if request.read + count == request.length:
                rows.append(len(ids) - 1)
                ready.append(request)
        requests = [request for request, _ in planned]
        logits_RV = self._reader.read(
            ids, [one.table for one in requests], [one.read for one in requests], [count for _, count in planned], rows
        )
        for request, count in planned:
            self.schedule.advance(request, count)
        return logits_RV, ready

    def _commit(self, ready: list[Request], tokens: Sequence[int]) -> list[Request]:
        """Give each text its token, and end those that are complete."""
        for request, token in zip(ready, tokens):
            request.written.append(token)
            if token in self.model.spec.stop_ids or self._stops(request):
                request.finish = "stop"
            elif len(request.written) == request.room:
                request.finish = "length"
            if request.finish is not None:
                self.schedule.finish(request)
        return ready

    def _stops(self, request: Request) -> bool:
        """Whether one of its stop texts has just been written."""
        stops = request.sampling.stop
        if not stops:
            return False
        # A token is a byte at least, a character four at most: so many last ones hold any stop text.
        longest = max(len(stop.encode()) for stop in stops) + 4
        text = self.model.renderer.decode(request.written[-longest:])
        return any(stop in text for stop in stops)


def numbers_of(seed: int, *key: object) -> Callable[[int], float]:
    """Numbers from 0 to 1 by place: the same for the same seed and key, whatever was drawn before or beside it."""
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, zlib.crc32(repr(key).encode())]

    def draw(place: int) -> float:
        return float(np.random.default_rng([*words, place]).random())

    return draw
