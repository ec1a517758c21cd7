"""Answers by beam search: each step of a search between two of the engine, so that others are written meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.engine.beams import Searches, kept_tokens
from luthier.engine.engine import Engine
from luthier.engine.generate import searched_for
from luthier.engine.pooler import Pooler
from luthier.engine.sampling import Sampling
from luthier.engine.terms import room_of
from luthier.faces.server.labelled import refuse_beside
from luthier.models.pages import BLOCK

if TYPE_CHECKING:
    from luthier.faces.server.hands import Hands


async def search(hands: Hands, message: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The likeliest answers to a prompt, as `Hands.write` takes it, that so many beams find; as many as `n` says. One search goes
    on at a time, with keys and values of its own."""
    model, ids = hands.model, tuple(hands.prompt(message))
    sampling = Sampling.make(message["sampling"], where="sampling")
    if message.get("tools") and message.get("choice") != "none":
        raise ConfigError(
            "use_beam_search: calls of tools are held to their schemas, and beams to none; leave tools out"
        )
    if model.spec.kind == "encoder-decoder":
        raise ConfigError(
            "use_beam_search: an encoder-decoder is searched by `luthier generate` alone; leave it out here"
        )
    refuse_beside(message, "is not searched with beams")
    async with hands.searching:
        searches = await hands.door.ask(lambda engine: _begin(engine, ids, sampling))
        while searches.busy:
            await hands.door.ask(lambda _: searches.step())
    whole = searched_for(model, searches.found[0], sampling, len(ids))
    found = [whole, *whole.others]
    answers = [{"text": one.text, "tokens": len(one.ids), "finish": one.finish} for one in found]
    written = sum(len(one.ids) for one in found)
    usage = {"prompt": len(ids), "written": written, "reused": 0, "drafted": 0, "accepted": 0}
    end: dict[str, Any] = {"answers": answers, "usage": usage}
    if message.get("echo"):
        end["prompt"] = model.tokenizer.decode(list(ids), skip_special_tokens=True)
    yield {"end": end}


def _begin(engine: Engine | Pooler, ids: Sequence[int], sampling: Sampling) -> Searches:
    assert isinstance(engine, Engine)
    needed = kept_tokens(len(ids), room_of(engine.model, ids, sampling), sampling.beams)
    most = engine.blocks.count * BLOCK
    if needed > most:
        raise ConfigError(
            f"use_beam_search: {sampling.beams} beams hold up to {needed} tokens, and at most {most} are kept; set n or "
            "max_tokens lower"
        )
    return Searches(engine.model, [ids], sampling, 1)
