"""A smaller model of the same tokenizer that guesses what texts go on with (Leviathan et al. 2023, arXiv:2211.17192).

Its guesses are like any others (`engine.drafts`): kept only where the larger model chooses the same token anyway, so nothing is
written otherwise. It guesses as the text is written: the likeliest token, or the one on which the draw of that place falls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from luthier.core.errors import ConfigError
from luthier.engine.blocks import Blocks
from luthier.engine.choose import choose, takes_likeliest
from luthier.engine.likeliest import not_numbers
from luthier.engine.readers import reader_for
from luthier.engine.request import Request
from luthier.engine.structure import Matcher, masks_made
from luthier.models.pages import page_size, writes_by_pages
from luthier.models.spec import LoadedModel

# Tokens of all texts that it reads at once to catch up with them.
AT_ONCE = 512
# Most tokens of a guess, the first guess, and steps without one after guesses that came to nothing.
MOST, FIRST, PAUSE = 15, 4, 8
MISSES = 3


class Pace:
    """How many tokens are worth guessing: more after a guess that was right, fewer after one that was not, none for a while
    after several."""

    def __init__(self) -> None:
        self._reach, self._misses, self._paused = FIRST, 0, 0

    def most(self, allowed: int) -> int:
        """Tokens of the next guess, of which so many are allowed at most."""
        if self._paused:
            self._paused -= 1
            return 0
        return min(allowed, self._reach)

    def learn(self, guessed: int, right: int) -> None:
        """How much of the last guess was right."""
        if right:
            self._misses = 0
            self._reach = min(MOST, self._reach * 2) if right == guessed else max(1, right + 1)
            return
        self._misses += 1
        self._reach = max(1, self._reach // 2)
        if self._misses >= MISSES:
            self._misses, self._paused, self._reach = 0, PAUSE, FIRST


@dataclass(eq=False, slots=True)
class Followed:
    """A text as the draft model knows it: the tokens whose keys and values lie in the blocks of its table."""

    table: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)


class DraftModel:
    """Guesses for all texts of an engine together, with keys and values of its own for them in so many blocks.

    Raises ConfigError for a model that cannot guess for the other (`check_draft`).
    """

    def __init__(self, draft: LoadedModel, model: LoadedModel, blocks: int):
        check_draft(draft, model)
        self.model, self._reader, self._blocks = draft, reader_for(draft, blocks), Blocks(blocks, size=page_size(draft))
        self._vocabulary = min(draft.vocabulary, model.vocabulary)
        self._texts: dict[Request, Followed] = {}
        self._guessed: set[Request] = set()

    def guess(self, wanted: Mapping[Request, int], running: Sequence[Request]) -> None:
        """Give each of these texts at most so many drafts. Texts that do not run any more are let go of."""
        for request in self._texts.keys() - set(running):
            self._release(self._texts.pop(request))
        self._guessed.clear()
        left = {
            request: most
            for request, asked in wanted.items()
            if (most := self._texts.setdefault(request, Followed()).pace.most(self._within(request, asked))) > 0
        }
        going = self._catch_up(left)
        guesses: dict[Request, list[int]] = {request: [] for request in going}
        places = {request: request.matcher.copy() for request in going if request.matcher is not None}
        while going:
            following = self._next(going, guesses, places)
            going = {}
            for request, token in following.items():
                if token < 0:
                    raise not_numbers()
                if token >= self._vocabulary:
                    continue
                guesses[request].append(token)
                if token in request.ends or (request in places and places[request].take(token)):
                    continue
                if len(guesses[request]) < left[request] and self._hold(self._texts[request], 1):
                    going[request] = [token]
        for request, found in guesses.items():
            request.drafts = found
            if found:
                self._guessed.add(request)

    def learn(self, request: Request, right: int) -> bool:
        """How many of a text's drafts were right; False where they were not from here."""
        if request not in self._guessed:
            return False
        self._texts[request].pace.learn(len(request.drafts), right)
        return True

    def _within(self, request: Request, most: int) -> int:
        """So many as end inside its own context."""
        return min(most, self.model.spec.max_length - request.length)

    def _catch_up(self, left: Mapping[Request, int]) -> dict[Request, list[int]]:
        """The tokens that are still to be read of each text before it is guessed for; a long one is read in several steps,
        and guessed for in the last."""
        budget, going = AT_ONCE, dict[Request, list[int]]()
        behind = dict[Request, list[int]]()
        for request in left:
            text = self._texts[request]
            whole = request.ids(0, request.length)
            # The last token is always read, to be told what follows it.
            same = _alike(text.ids, whole[:-1])
            del text.ids[same:]
            new = whole[same : same + budget]
            # A padded vocabulary may be longer than the other.
            if not new or max(new) >= self._vocabulary or not self._hold(text, len(new)):
                continue
            budget -= len(new)
            (going if same + len(new) == len(whole) else behind)[request] = new
        if behind:
            self._read(behind, likeliest=True)
        return going

    def _next(
        self,
        new: Mapping[Request, list[int]],
        guesses: Mapping[Request, list[int]],
        places: Mapping[Request, Matcher],
    ) -> dict[Request, int]:
        """What the draft model would write after these tokens, within the structure of each text."""
        # How likely a token is nobody asks here.
        texts = [
            replace(
                one, written=[*one.written, *guesses[one]], matcher=places.get(one), logs=[], drafts=[],
                sampling=one.sampling.model_copy(update={"logprobs": None}),
            )
            for one in new
        ]  # fmt: skip
        likeliest = all(takes_likeliest(one) for one in texts)
        with masks_made(texts):
            found = self._read(new, likeliest)
        tokens = found.tolist() if likeliest else choose(found, texts)
        return {request: token for request, token in zip(new, tokens) if isinstance(token, int)}

    def _read(self, new: Mapping[Request, list[int]], likeliest: bool) -> torch.Tensor:
        texts = [self._texts[request] for request in new]
        lengths = [len(ids) for ids in new.values()]
        ends = [sum(lengths[: at + 1]) - 1 for at in range(len(lengths))]
        found = self._reader.read(
            [token for ids in new.values() for token in ids], [one.table for one in texts], [len(one.ids) for one in texts],
            lengths, ends, likeliest=likeliest,
        )  # fmt: skip
        for one, ids in zip(texts, new.values()):
            one.ids += ids
        return found

    def _hold(self, text: Followed, count: int) -> bool:
        """Room for so many tokens more; False where there is none."""
        missing = -(-(len(text.ids) + count) // self._blocks.size) - len(text.table)
        if missing > self._blocks.free:
            return False
        text.table += [self._blocks.take() for _ in range(missing)]
        return True

    def _release(self, text: Followed) -> None:
        for block in text.table:
            self._blocks.drop(block)


def check_draft(draft: LoadedModel, model: LoadedModel) -> None:
    """Raises ConfigError where `draft` cannot guess what `model` writes."""
    name = draft.spec.source
    if draft.spec.task != "causal" or not writes_by_pages(draft):
        raise ConfigError(
            f"draft: {name} does not write text by text side by side; choose a decoder-only language model"
        )
    if model.spec.kind != "decoder":
        raise ConfigError(f"draft: what {model.spec.source} writes from a source cannot be guessed; leave draft out")
    if draft.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise ConfigError(
            f"draft: {name} and {model.spec.source} have different vocabularies, so one cannot guess the tokens of the other; "
            "choose a smaller model of the same family"
        )


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)
