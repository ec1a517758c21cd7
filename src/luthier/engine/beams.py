"""Beam search by blocks: texts of one search hold what they have in common once, and copy the block in which they part. Those
of an encoder-decoder have a row each, and share nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from luthier.engine.adapters import NONE
from luthier.engine.blocks import Blocks
from luthier.engine.choose import settled
from luthier.engine.crossed import early_of, never_of, opening_of
from luthier.engine.likeliest import not_numbers
from luthier.engine.native import own_adapter
from luthier.engine.pieces import stops_here
from luthier.engine.reader import Reader
from luthier.engine.readers import reader_for
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling
from luthier.engine.terms import banned_of, check_terms, ends_of, room_of
from luthier.models.pages import page_size
from luthier.models.spec import LoadedModel

# Tokens of prompts that go through the model at once.
TOKENS = 512


def search(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    at_once: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The likeliest answer to each prompt that beams find, with its end token: that of transformers' `num_beams`, whose score is
    the log-probability of its tokens, divided by their number to the power of `length_penalty`. So many searches `at_once`.
    Raises DataError for a prompt without room, and ModelError for logits that are not numbers."""
    return [found[0] for found in search_each(model, prompts, sampling, at_once, on_progress)]


def search_each(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    at_once: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[list[int]]]:
    """The same, with all answers to each prompt that the search ends with, the likeliest first."""
    searches = Searches(model, prompts, sampling, at_once)
    done = 0
    while searches.busy:
        searches.step()
        if on_progress is not None and searches.done > done:
            on_progress(searches.done, len(prompts))
        done = searches.done
    return searches.found


class Searches:
    """Searches for answers to several prompts, so many `at_once`, which go on step by step. Raises as `search` does."""

    def __init__(self, model: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, at_once: int):
        self._all = [Search(model, prompt, sampling) for prompt in prompts]
        most = sorted((one.blocks for one in self._all), reverse=True)[:at_once]
        self._reader, self._at_once = reader_for(model, sum(most)), at_once
        self._blocks = Blocks(sum(most), size=page_size(model))
        self._adapter = 0 if own_adapter(model) else NONE
        self._waiting, self._running = self._all[::-1], list[Search]()

    @property
    def busy(self) -> bool:
        """Whether any goes on."""
        return bool(self._waiting or self._running)

    @property
    def done(self) -> int:
        """How many ended."""
        return len(self._all) - len(self._waiting) - len(self._running)

    @property
    def found(self) -> list[list[list[int]]]:
        """The answers to each prompt, the likeliest first."""
        return [one.found for one in self._all]

    @torch.inference_mode()
    def step(self) -> None:
        """One token more of every text that is searched for."""
        while self._waiting and len(self._running) < self._at_once:
            self._running.append(self._waiting.pop())
        advance(self._reader, self._blocks, self._running, self._adapter)
        self._running = [one for one in self._running if one.texts]


class Search:
    """One prompt: the texts that go on, all of one length, the likeliest first, and the answers that ended. Raises as `search`
    does."""

    def __init__(self, model: LoadedModel, prompt: Sequence[int], sampling: Sampling):
        check_terms(model, sampling)
        room, opening = room_of(model, prompt, sampling), None
        ends, banned = ends_of(model, sampling), (*banned_of(model, sampling), *never_of(model))
        self.apart = model.spec.kind == "encoder-decoder"
        if self.apart:
            opening = opening_of(model)
        self.begun = max(0, len(opening or ()) - 1)
        """Tokens that an answer is made to begin with, which count where answers are compared, as with transformers."""
        self.model, self.beams, self.penalty = model, sampling.beams, sampling.length_penalty
        self._early = early_of(model) if self.apart else False
        # Nothing is drawn.
        self.texts = [Request(tuple(prompt), sampling, room, 0, float, ends=ends, banned=banned, opening=opening)]
        self.scores = [0.0]
        self.ended: list[tuple[float, list[int]]] = []
        """Score and tokens of each, the likeliest first."""
        self.blocks = sampling.beams * -(-(len(prompt) + room) // page_size(model))
        """That it holds at most."""

    @property
    def found(self) -> list[list[int]]:
        """The answers, the likeliest first."""
        return [tokens for _, tokens in self.ended]

    def advance(self, logits_BV: Tensor) -> list[tuple[int, int]]:
        """Take the likeliest next tokens of all texts together: those that end an answer are set aside, of the others as
        many go on as there are beams; (text, token) of each, none where no better answer can come."""
        sums = [
            settled(row_V.log_softmax(-1), text) + score
            for row_V, text, score in zip(logits_BV, self.texts, self.scores, strict=True)
        ]
        sums_N = torch.cat(sums)
        # So many that as many as there are beams go on, whichever end.
        most = max(2, 1 + len(self.texts[0].ends)) * self.beams
        values, places = sums_N.topk(min(most, len(sums_N)))
        # What is no number is found largest.
        if values[0].isnan():
            raise not_numbers()
        going: list[tuple[float, int, int]] = []
        divisor = (self.begun + len(self.texts[0].written) + 1) ** self.penalty
        for rank, (score, place) in enumerate(zip(values.tolist(), places.tolist())):
            if score == -torch.inf:
                break
            which, token = divmod(place, logits_BV.shape[1])
            written = [*self.texts[which].written, token]
            if not self._ends(self.texts[which], written):
                going.append((score, which, token))
            elif rank < self.beams:
                self.ended.append((score / divisor, written))
        self.ended = sorted(self.ended, key=lambda one: -one[0])[: self.beams]
        going = going[: self.beams]
        # A score may rise yet, but transformers' search ends here too, unless its `early_stopping` is "never".
        if self._early == "never" and self.penalty > 0:
            divisor = (self.begun + self.texts[0].room) ** self.penalty
        full = len(self.ended) == self.beams
        if not going or (full and (self._early is True or going[0][0] / divisor <= self.ended[-1][0])):
            return []
        self.scores = [score for score, _, _ in going]
        return [(which, token) for _, which, token in going]

    def _ends(self, text: Request, written: list[int]) -> bool:
        if len(written) == text.room or written[-1] in text.ends:
            return True
        return stops_here(self.model, written, text.sampling)

    def fork(self, chosen: Sequence[tuple[int, int]], reader: Reader, blocks: Blocks) -> None:
        """Go on with these: the first child of a text takes its blocks over, each other one shares those that are full, or has
        one of its own where texts are apart."""
        parents = {which for which, _ in chosen}
        for which, text in enumerate(self.texts):
            if which not in parents:
                reader.drop(text.table[0])
                for block in text.table:
                    blocks.drop(block)
        texts: list[Request] = []
        for which, token in chosen:
            text, table = self.texts[which], self.texts[which].table
            if which in parents:
                parents.discard(which)
            elif self.apart:
                table = [blocks.take()]
                reader.copy(text.table[0], table[0])
            else:
                table = [blocks.share(block) for block in table[: text.read // blocks.size]]
                if text.read % blocks.size:
                    table.append(blocks.take())
                    reader.copy(text.table[-1], table[-1])
            texts.append(replace(text, written=[*text.written, token], table=table))
        self.texts = texts


def advance(reader: Reader, blocks: Blocks, running: Sequence[Search], adapter: int = NONE) -> None:
    """Read one token more of every text that is searched for, with the adapter of that number, and as much of prompts as there
    is room for; the source of an encoder-decoder is read whole."""
    budget = TOKENS
    planned: list[tuple[Request, int]] = []
    texts = [(one.apart, text) for one in running for text in one.texts]
    for apart, text in sorted(texts, key=lambda one: one[1].length - one[1].read > 1):
        left = text.length - text.read
        # The texts of a search are read in step: none waits for the room that prompts take.
        count = left if apart or left == 1 else min(left, max(budget, 0 if planned else 1))
        if count:
            needed = 1 if apart else -(-(text.read + count) // blocks.size)
            text.table += [blocks.take() for _ in range(needed - len(text.table))]
            planned.append((text, count))
            budget -= count
    ids: list[int] = []
    rows: dict[Request, int] = {}
    for text, count in planned:
        ids += text.ids(text.read, text.read + count)
        if text.read + count == text.length:
            rows[text] = len(ids) - 1
    tables, before = [text.table for text, _ in planned], [text.read for text, _ in planned]
    lengths, adapters = [count for _, count in planned], [adapter] * len(planned)
    logits_RV = reader.read(ids, tables, before, lengths, list(rows.values()), adapters=adapters)
    for text, count in planned:
        text.read += count
    order = {text: at for at, text in enumerate(rows)}
    for one in running:
        if all(text in order for text in one.texts):
            one.fork(one.advance(logits_RV[[order[text] for text in one.texts]]), reader, blocks)
