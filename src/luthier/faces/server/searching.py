"""Answers by beam search: each step of a search between two of the engine, so that others are written meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.engine.generate import searched_for
from luthier.engine.searching import Searching

if TYPE_CHECKING:
    from luthier.faces.server.hands import Hands


async def search(hands: Hands, message: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The likeliest answers to a prompt, as `Hands.write` takes it, that so many beams find; as many as `n` says. One search goes
    on at a time, with keys and values among those of all texts: it waits where they hold too many."""
    model, ids = hands.model, tuple(hands.prompt(message))
    sampling = hands.sampling(message, ids)
    if message.get("tools") and message.get("choice") != "none":
        raise ConfigError(
            "use_beam_search: calls of tools are held to their schemas, and beams to none; leave tools out"
        )
    adapter = message.get("adapter", "")
    async with hands.searching:
        searching: Searching = await hands.door.ask(lambda engine: engine.search(ids, sampling, adapter=adapter))
        try:
            while not await hands.door.ask(lambda _: searching.begin()):
                pass
            while searching.busy:
                await hands.door.ask(lambda _: searching.step())
        finally:
            hands.door.tell(lambda _: searching.leave())
    whole = searched_for(model, searching.found, sampling, len(ids))
    found = [whole, *whole.others]
    answers = [{"text": one.text, "tokens": len(one.ids), "finish": one.finish} for one in found]
    written = sum(len(one.ids) for one in found)
    usage = {"prompt": len(ids), "written": written, "reused": 0, "drafted": 0, "accepted": 0}
    end: dict[str, Any] = {"answers": answers, "usage": usage}
    if message.get("echo"):
        end["prompt"] = model.tokenizer.decode(list(ids), skip_special_tokens=True)
    yield {"end": end}
