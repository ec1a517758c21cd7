"""Beam search beside an engine that writes: in its blocks, by its reader, a step of it between two of the engine's."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.engine.adapters import NONE, Lent
from luthier.engine.beams import Search, advance
from luthier.engine.blocks import Blocks
from luthier.engine.line import Line
from luthier.engine.reader import Reader
from luthier.engine.readers import kept_bytes
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling
from luthier.models.memory import out_of_memory, return_freed_memory
from luthier.models.spec import LoadedModel


class Searching:
    """One search, from `begin` to `leave`. Its keys and values lie in blocks that are the engine's, so that a search takes no
    more memory than was planned: all that it may come to need are held from the beginning to the end.

    Raises ConfigError for one that holds more than there is, and as `beams.search` does.
    """

    def __init__(
        self,
        model: LoadedModel,
        reader: Reader,
        blocks: Blocks,
        line: Line[Request],
        prompt: Sequence[int],
        sampling: Sampling,
        lent: Lent | None,
    ):
        self._model, self._reader, self._whole, self._line, self._lent = model, reader, blocks, line, lent
        self._search = Search(model, prompt, sampling)
        self._held: list[int] = []
        self._own: Blocks | None = None
        needed = self._search.blocks
        if needed > blocks.count:
            room, size = self._search.texts[0].room, kept_bytes(model) * blocks.size / 1e6
            raise ConfigError(
                f"{sampling.beams} beams for a prompt of {len(prompt)} tokens with {room} to write hold keys and values of up to "
                f"{needed * blocks.size} tokens ({needed * size:.1f} MB), and {blocks.tokens} ({blocks.count * size:.1f} MB) "
                "are kept in all; set n or max_tokens lower"
            )

    @property
    def busy(self) -> bool:
        """Whether it goes on."""
        return bool(self._search.texts)

    @property
    def found(self) -> list[list[int]]:
        """The answers, the likeliest first."""
        return self._search.found

    def begin(self) -> bool:
        """Hold its blocks; False where texts that are written hold too many: until it may begin, none more is taken up."""
        if self._whole.free < self._search.blocks:
            self._line.closed = True
            return False
        self._line.closed = False
        self._held = [self._whole.take() for _ in range(self._search.blocks)]
        self._own = Blocks(len(self._held), self._held, size=self._whole.size)
        return True

    @torch.inference_mode()
    def step(self) -> None:
        """One token more of every text that is searched for. Raises ModelError where the adapter was taken out, or memory ran
        out."""
        assert self._own is not None
        if self._lent is not None:
            self._lent.check()
        try:
            advance(self._reader, self._own, [self._search], NONE if self._lent is None else self._lent.slot)
            return
        except (MemoryError, RuntimeError) as err:
            if not out_of_memory(err):
                raise
            traceback.clear_frames(err.__traceback__)
        return_freed_memory(self._model.device)
        beams = self._search.beams
        raise ModelError(
            f"memory ran out while {beams} beams were searched; ask for fewer (n), or for a shorter answer"
        )

    def leave(self) -> None:
        """Give back what it holds, wherever it is."""
        if not self._held and self.busy:
            self._line.closed = False
        for block in self._held:
            self._reader.drop(block)
            self._whole.drop(block)
        self._held.clear()
        self._search.texts = []
