"""Tokens to text that can be shown: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from luthier.core.types import Completion
from luthier.engine.logs import added
from luthier.engine.sampling import Sampling
from luthier.engine.terms import ends_of
from luthier.models.spec import LoadedModel
from luthier.text.growing import GrowingText


def pieces(model: LoadedModel, tokens: Iterable[int], sampling: Sampling) -> Iterator[str]:
    """The text of `tokens` as they come (`Growing`)."""
    growing = Growing(model, sampling)
    for token in tokens:
        piece = growing.take(token)
        if piece:
            yield piece
        if growing.ended:
            break
    rest = growing.rest()
    if rest:
        yield rest


class Growing:
    """The text of tokens that come one by one, up to a stop token or a stop text: half a character, or the beginning of a stop
    text, is held back until it is known."""

    def __init__(self, model: LoadedModel, sampling: Sampling):
        self.ids: list[int] = []
        """What came, but for a token that ends it."""
        self.ended = False
        """Whether a stop token or a stop text came."""
        self._model, self._sampling, self._ends = model, sampling, ends_of(model, sampling)
        shown = sampling.shown_ids
        self._text = GrowingText(model.tokenizer, lambda ids: model.renderer.decode(ids, shown), shown)
        self._held, self._cut = "", False
        self._shown = self._early = 0

    def take(self, token: int) -> str:
        """What can be shown after one token more."""
        if token in self._ends:
            self.ended = True
            return ""
        self.ids.append(token)
        text = self._text.take(token)
        if len(self.ids) == 1:
            text = lead_of(self._model, self.ids, self._sampling) + text
        if not self._sampling.stop:
            return text
        self._held += text
        if len(self.ids) < self._sampling.min_tokens - 1:
            # Any stop text in it comes too early.
            self._early = self._shown + len(self._held)
        elif len(self.ids) == self._sampling.min_tokens - 1:
            self._early = _early(self._model, self.ids, self._sampling)
        return self._show(len(self._held) - _beginning(self._held, self._sampling.stop))

    def rest(self) -> str:
        """What was held back, where no token comes any more."""
        if self._cut:
            return ""
        self._held += self._text.rest()
        return self._show(len(self._held))

    def _show(self, upto: int) -> str:
        """So much of what is held, or less where a stop text is in it: then nothing comes after that."""
        cut = find_stop(self._held, self._sampling.stop, self._early - self._shown)
        if cut is not None:
            self.ended = self._cut = True
            return self._held[:cut]
        piece, self._held = self._held[:upto], self._held[upto:]
        self._shown += upto
        return piece


def complete(
    model: LoadedModel, ids: Sequence[int], sampling: Sampling, prompt_tokens: int, ended: bool = False
) -> Completion:
    """The answer that `ids` make, up to a stop token or a stop text; `ended` where it is known to be whole without."""
    ends = ends_of(model, sampling)
    end = next((at for at, token in enumerate(ids) if token in ends), None)
    kept = ids if end is None else ids[:end]
    text = text_of(model, kept, sampling)
    cut = find_stop(text, sampling.stop, _early(model, kept, sampling))
    if cut is not None:
        text = text[:cut]
    finish = "stop" if ended or end is not None or cut is not None else "length"
    return Completion(text, tuple(kept), finish, prompt_tokens)  # type: ignore[arg-type]


def find_stop(text: str, stops: Sequence[str], early: int = 0) -> int | None:
    """Where the first stop text begins; those that are whole within `early` characters came too early to count."""
    found = [at for at in (text.find(stop, max(0, early - len(stop) + 1)) for stop in stops) if at >= 0]
    return min(found) if found else None


def stops_here(model: LoadedModel, written: Sequence[int], sampling: Sampling) -> bool:
    """Whether the last token makes a stop text whole."""
    if not sampling.stop or len(written) < sampling.min_tokens:
        return False
    # A token is a byte at least, a character four at most: so many last ones hold any stop text.
    start = max(0, len(written) - max(len(stop.encode()) for stop in sampling.stop) - 4)
    early = _early(model, written[start:], sampling, start)
    return find_stop(text_of(model, written[start:], sampling, start), sampling.stop, early) is not None


def text_of(model: LoadedModel, ids: Sequence[int], sampling: Sampling, start: int = 0) -> str:
    """The text of an answer, stop texts and all; `ids` are its tokens from `start` on."""
    text = model.renderer.decode(ids, sampling.shown_ids)
    return text if start else lead_of(model, ids, sampling) + text


def lead_of(model: LoadedModel, ids: Sequence[int], sampling: Sampling) -> str:
    """The space with which an answer goes on from a text, where decoders (of SentencePiece) drop that of a first token."""
    if not sampling.after or not ids:
        return ""
    return " " if added(model, sampling.after, ids[0]) == f" {model.renderer.decode(ids[:1])}" else ""


def _early(model: LoadedModel, ids: Sequence[int], sampling: Sampling, start: int = 0) -> int:
    """Characters of the tokens after which nothing may end the answer: all but the last of the first `min_tokens` of it; `ids`
    are those from `start` on."""
    least = sampling.min_tokens - start
    return len(text_of(model, ids[: least - 1], sampling, start).rstrip("\ufffd")) if least > 1 else 0


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many last characters may be the beginning of a stop text."""
    sizes = range(min(len(text), max(map(len, stops), default=0)), 0, -1)
    return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)
