"""Tokens to text that can be shown: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from luthier.core.types import Completion
from luthier.engine.sampling import Sampling
from luthier.models.spec import LoadedModel


def pieces(model: LoadedModel, tokens: Iterable[int], sampling: Sampling) -> Iterator[str]:
    """The text of `tokens` as they come, up to a stop token or a stop text: half a character, or the beginning of a stop
    text, is held back until it is known."""
    written: list[int] = []
    shown = 0
    for token in tokens:
        if token in model.spec.stop_ids:
            break
        written.append(token)
        text = model.renderer.decode(written)
        cut = find_stop(text, sampling.stop)
        if cut is not None:
            if cut > shown:
                yield text[shown:cut]
            return
        ready = len(text[: len(text) - _held(text, sampling.stop)].rstrip("\ufffd"))
        if ready > shown:
            yield text[shown:ready]
            shown = ready
    rest = model.renderer.decode(written)[shown:]
    if rest:
        yield rest


def complete(
    model: LoadedModel, ids: Sequence[int], sampling: Sampling, prompt_tokens: int, ended: bool = False
) -> Completion:
    """The answer that `ids` make, up to a stop token or a stop text; `ended` where it is known to be whole without."""
    end = next((at for at, token in enumerate(ids) if token in model.spec.stop_ids), None)
    kept = ids if end is None else ids[:end]
    text = model.renderer.decode(kept)
    cut = find_stop(text, sampling.stop)
    if cut is not None:
        text = text[:cut]
    finish = "stop" if ended or end is not None or cut is not None else "length"
    return Completion(text, tuple(kept), finish, prompt_tokens)  # type: ignore[arg-type]


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found) if found else None


def _held(text: str, stops: Sequence[str]) -> int:
    """How many last characters may be the beginning of a stop text."""
    sizes = range(min(len(text), max(map(len, stops), default=0)), 0, -1)
    return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)
