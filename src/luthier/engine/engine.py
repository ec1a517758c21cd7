"""One engine for everything that writes: texts that come and go share each pass through the model."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.engine.adapters import NONE, Adapters, Loaded
from luthier.engine.blocks import Blocks, names_of
from luthier.engine.choose import choose
from luthier.engine.crossed import never_of, opening_of
from luthier.engine.draft_model import DraftModel
from luthier.engine.forward import Forward
from luthier.engine.guessing import Guessing, rows_of
from luthier.engine.likeliest import not_numbers
from luthier.engine.numbers import numbers_of
from luthier.engine.pieces import stops_here
from luthier.engine.pooler import Embedding, Pooler, Reading
from luthier.engine.readers import reader_for, schedule_for, writes_side_by_side
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling
from luthier.engine.scoring import Asked, Score, Scorer
from luthier.engine.searching import Searching
from luthier.engine.structure import masks_made, matcher_for
from luthier.engine.terms import banned_of, check_terms, ends_of, room_of
from luthier.models.adapters.additions import Additions
from luthier.models.pages import page_size
from luthier.models.spec import LoadedModel

# Texts that run at once, and tokens that go through the model at once, where nobody says.
STREAMS, TOKENS = 32, 512
# Tokens that are guessed for a step, of all texts together: more rows than that keep the processor busy for longer.
GUESSED = 32


class Engine:
    """Writes with a language model, any number of texts at a time: what follows a prompt, or of an encoder-decoder the answer to
    a source.

    `room` is how many tokens of all texts together are kept at most; what is read of a prompt is kept for others that
    begin alike. A step is: plan, read, write one token more of every text that is read to its end. On a CPU what a text
    becomes does not depend on the texts beside it, bit for bit; of an encoder-decoder but for rounding. Raises ModelError for a
    model that cannot write so (`readers.writes_side_by_side`). Of what comes next, `guessed` tokens of all texts are guessed
    for a step (`engine.drafts`), by the model's `draft` too, where it has one. Vectors of texts are made beside it (`pool`).
    """

    def __init__(
        self, model: LoadedModel, room: int, *, streams: int = STREAMS, tokens: int = TOKENS, guessed: int = GUESSED
    ):
        if not writes_side_by_side(model):
            raise ModelError(f"{model.spec.source}: {model.spec.family} models do not write text by text side by side")
        self.model, self._arrived = model, 0
        size = page_size(model)
        blocks = -(-room // size)
        self._reader, self.blocks = reader_for(model, blocks), Blocks(blocks, size=size)
        self.schedule = schedule_for(self._reader, self.blocks, streams, tokens)
        self._apart = model.spec.kind == "encoder-decoder"
        self._forward = Forward(model, self._reader, self.schedule)
        self._scorer = None if self._apart else Scorer(model)
        self._pooler: Pooler | None = None
        self._beside = Adapters(model, self._reader)
        self._guessing: Guessing | None = None
        if guessed and not self._apart:
            # The draft model's texts share no beginnings, and a few more tokens of each are guessed.
            draft = None if model.draft is None else DraftModel(model.draft, model, blocks + streams)
            self._guessing = Guessing(guessed, model.learned, draft)
        self._failed: list[Request | Reading] = []
        self._unguessed: list[tuple[Request, Exception]] = []

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        draw: Callable[[int], float] | None = None,
        priority: int = 0,
        salt: str = "",
        tenant: str = "",
        adapter: str = "",
        expected: Sequence[int] = (),
    ) -> Request:
        """A text to go on from, which waits until a step takes it up. `draw` gives the number for each place of the answer;
        without it one is drawn from the sampling's seed, or from chance. `adapter` is the name of one that was loaded. Tokens
        that are `expected` in the answer are guessed, and change nothing else.

        Raises DataError for a prompt that leaves no room, and ConfigError for settings that no step can follow.
        """
        if sampling.beams > 1:
            raise ConfigError("beams: this engine writes one answer at a time; set beams: 1")
        if sampling.n > 1:
            raise ConfigError("n: a text that is added has one answer; add it as often as it is to be answered")
        if self._apart and sampling.prompt_logprobs:
            raise ConfigError("prompt_logprobs: an encoder-decoder predicts nothing of its source; leave it out")
        check_terms(self.model, sampling)
        room = room_of(self.model, prompt, sampling)
        if len(prompt) + room > self.blocks.tokens:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens with {room} to write does not fit into {self.blocks.tokens} tokens, "
                "all that is kept; set max_tokens lower, or shorten the prompt"
            )
        ends, banned = ends_of(self.model, sampling), (*banned_of(self.model, sampling), *never_of(self.model))
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        beside = self._beside.find(adapter) if adapter else None
        # What a token's keys and values are depends on its adapter, which a later one of the same name is not.
        salt = f"{NONE if beside is None else beside.serial} {salt}"
        names = () if self._apart else tuple(names_of(prompt, salt, self.blocks.size))
        request = Request(
            tuple(prompt), sampling, room, self._arrived, draw or numbers_of(seed), priority, salt, tenant,
            NONE if beside is None else beside.slot, ends, banned, names,
            opening_of(self.model) if self._apart else None,
        )  # fmt: skip
        if sampling.structure is not None:
            request.matcher = matcher_for(self.model, sampling.structure)
        if self._guessing is not None and not sampling.prompt_logprobs:
            request.guesser = self._guessing.take_up(prompt, expected)
        self._arrived += 1
        self.schedule.add(request)
        return request

    def pool(
        self, ids: Sequence[int], embedding: Embedding, *, priority: int = 0, tenant: str = "", adapter: str = ""
    ) -> Reading:
        """A text to make a vector of, which is read beside what is written. Raises as `Pooler.pool` does."""
        if self._pooler is None:
            tokens, tenants = self.schedule.tokens, self.schedule.tenants
            self._pooler = Pooler(self.model, tokens=tokens, tenants=tenants, reader=self._reader)
        slot = self._beside.find(adapter).slot if adapter else NONE
        return self._pooler.pool(ids, embedding, priority=priority, tenant=tenant, adapter=slot)

    def search(self, prompt: Sequence[int], sampling: Sampling, *, adapter: str = "") -> Searching:
        """A beam search that goes on beside what is written, in the same blocks: `begin` it until it is, `step` it between two
        steps, and `leave` it. Raises ConfigError for one that holds more than is kept in all, and as `beams.search` does."""
        lent = self._beside.lend(adapter) if adapter else None
        return Searching(self.model, self._reader, self.blocks, self.schedule, prompt, sampling, lent)

    def abort(self, request: Request | Reading) -> None:
        """End a text where it is; nothing happens to one that has ended."""
        if isinstance(request, Reading):
            if self._pooler is not None:
                self._pooler.abort(request)
        elif request.finish is None:
            request.finish = "abort"
            self.schedule.finish(request)
            self._let_go()

    @property
    def adapters(self) -> Mapping[str, Loaded]:
        """The adapters that texts can be written with, by name."""
        return self._beside.named

    def load_adapter(
        self, name: str, source: str | Path | LoadedModel | Additions, events: Events | None = None
    ) -> Loaded:
        """Let texts be written with the adapter at `source` from here on: run:<id>, a directory in PEFT's format, a tuned model
        in memory, or what `models.adapters.additions.read_additions` read of these on another thread. Nothing changes for
        texts that are being written.

        Raises ConfigError for a name that is taken, and ModelError for an adapter with which anything is wrong.
        """
        return self._beside.load(name, source, events)

    def unload_adapter(self, name: str, *, now: bool = False) -> Loaded:
        """Let no text more be written with this adapter. Those that are go on to their end, after which what it holds is
        freed; `now`: they end with an error, in the next step. Raises ConfigError where there is none of that name."""
        gone = self._beside.unload(name)
        error = ModelError(f"the adapter {name!r} was unloaded while this was written; ask again")
        for request in [*self.schedule.running, *self.schedule.waiting] if now else []:
            if request.adapter == gone.slot:
                self._fail(request, error)
        if now and self._pooler is not None:
            for reading in [one for one in self._pooler.waiting if one.adapter == gone.slot]:
                self._pooler.fail(reading, error)
                self._failed.append(reading)
        if now:
            self._beside.call_back(gone.slot, error)
        self._let_go()
        return gone

    def _let_go(self) -> None:
        """Free the adapters that were unloaded and are of no more use, and what was read with them."""
        reading = self._pooler.waiting if self._pooler is not None else ()
        for one in self._beside.let_go([*self.schedule.running, *self.schedule.waiting, *reading]):
            self.blocks.forget(one.slot)

    @property
    def busy(self) -> bool:
        """Whether any text is not finished, or ended with an error that no step has told yet."""
        pooling = self._pooler is not None and self._pooler.busy
        return bool(self.schedule.waiting or self.schedule.running or self._failed or pooling)

    @property
    def waiting(self) -> list[Request | Reading]:
        """Texts that were not taken up yet."""
        return [*self.schedule.waiting, *(self._pooler.waiting if self._pooler is not None else ())]

    @torch.inference_mode()
    def step(self) -> list[Request | Reading]:
        """The texts that have one token more, or their vector, or ended with an error.

        What goes wrong with one text ends that one alone, with the error kept on it; what goes wrong in reading ends those
        that were read together. Either way the engine goes on with the others, whose tokens are what they would have been.
        """
        ready = list[Request]()
        try:
            began = time.perf_counter()
            if self._guessing is not None:
                self._guessing.give(self.schedule.running, self._fail)
            planned = self.schedule.plan(None if self._guessing is None else self._begin)
            rows = rows_of(planned)
            ready = self._commit(*self._forward.read(planned, self._fail)) if planned else []
            # Processes that read together must guess alike, and their clocks differ.
            if self._guessing is not None and rows and self.model.parts == 1:
                self._guessing.time(rows, time.perf_counter() - began)
        except Exception as err:
            # Nobody knows which of them is to blame.
            for request in [*self.schedule.running, *self.schedule.waiting]:
                self._fail(request, err)
        failed, self._failed = self._failed, []
        for one in failed:
            # What the frames of an error hold is as large as a step.
            traceback.clear_frames(one.error.__traceback__ if one.error is not None else None)
        read = self._pooler.step() if self._pooler is not None and self._pooler.busy else []
        self._let_go()
        return [*dict.fromkeys([*ready, *failed]), *read]

    def run(self, on_progress: Callable[[list[Request | Reading]], None] | None = None) -> None:
        """Step until every text is finished. Raises the error of one that ended with it."""
        while self.busy:
            found = self.step()
            for one in found:
                if one.error is not None:
                    raise one.error
            if on_progress is not None:
                on_progress(found)

    def score(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]], *, adapter: str = "") -> list[Score]:
        """How likely each continuation of the prompt is; what runs and waits is not touched. Raises DataError."""
        return self.score_all([(prompt, continuations)], adapter=adapter)[0]

    def score_all(self, asked: Sequence[Asked], *, adapter: str = "") -> list[list[Score]]:
        """The same for many prompts at once; what they begin alike with is read once, and without an adapter kept for the next
        call."""
        return self.scorer(adapter).score(asked)

    def scorer(self, adapter: str = "") -> Scorer:
        """What scores continuations, with an adapter or without one; it is used between two steps. Raises ModelError for an
        encoder-decoder, and ConfigError where there is no adapter of that name."""
        if self._scorer is None:
            raise ModelError(f"{self.model.spec.source}: only a decoder scores what follows a prompt; use one")
        return Scorer(self.model, self._beside.lend(adapter), self._reader) if adapter else self._scorer

    def _commit(self, found: torch.Tensor, first: dict[Request, int]) -> list[Request]:
        """Give each text its next token, and those after it as long as they were guessed; end those that are complete.

        `found` has a row (or the likeliest token) for the end of each text and for each of its drafts, in order; `first` says
        where they begin.
        """
        while self._unguessed:
            request, error = self._unguessed.pop()
            if request.finish is None:
                self._fail(request, error)
        going, depth = [one for one in first if one.finish is None], 0
        while going:
            rows = found if len(going) == len(found) else found[[first[request] + depth for request in going]]
            for request, token in zip(going, rows.tolist() if rows.dim() == 1 else choose(rows, going)):
                try:
                    self._write(request, token)
                except Exception as err:
                    self._fail(request, err)
            going = [
                one for one in going
                if len(one.drafts) > depth and one.finish is None and one.drafts[depth] == one.written[-1]
            ]  # fmt: skip
            with masks_made(going):
                depth += 1
        for request in first:
            if request.drafts:
                try:
                    self._keep_drafts(request)
                except Exception as err:
                    self._fail(request, err)
            if request.finish is not None:
                self.schedule.finish(request)
        return list(first)

    def _begin(self, request: Request) -> None:
        """Guess what comes right after a prompt. What goes wrong is told when the step is read, which counts on this text."""
        assert self._guessing is not None
        try:
            self._guessing.begin(request)
        except Exception as err:
            self._unguessed.append((request, err))

    def _keep_drafts(self, request: Request) -> None:
        """All that is new but the last token was guessed, and read with the guess."""
        right = request.length - request.read - 1
        self.schedule.advance(request, right)
        if self._guessing is not None:
            self._guessing.learn(request, right)
        request.drafted += len(request.drafts)
        request.accepted += right
        request.drafts = []

    def _write(self, request: Request, token: int | Exception) -> None:
        if isinstance(token, Exception):
            raise token
        if token < 0:
            raise not_numbers()
        if not request.written:
            request.first_at = time.monotonic()
        request.written.append(token)
        if (
            token in request.ends
            or stops_here(self.model, request.written, request.sampling)
            or (request.matcher is not None and request.matcher.take(token))
        ):
            request.finish = "stop"
        elif len(request.written) == request.room:
            request.finish = "length"

    def _fail(self, request: Request, error: Exception) -> None:
        """What went wrong with a text ends it and no other."""
        request.error, request.finish = error, "error"
        self.schedule.finish(request)
        self._failed.append(request)
