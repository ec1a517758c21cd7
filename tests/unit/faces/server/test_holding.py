"""Nothing is held in memory that the plan at the start does not know."""

import asyncio
import weakref

import pytest
import torch

from luthier.engine import lanes
from luthier.faces.server.hands import load
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from luthier.models.pages import BLOCK
from luthier.models.save import save_model
from luthier.native.cached import Cached
from luthier.native.library import why_no_decoder

ORDER = {"source": "mini", "streams": 64, "waiting": 256}


def adapter(place):
    torch.manual_seed(1)
    model = load_model("mini")
    ADAPTERS.parse({"kind": "lora", "rank": 4}).apply(model)
    save_model(model, place)
    return str(place)


async def ask(hands, asked):
    return [part async for part in hands.do(asked)][-1]["end"]


def labelled(at, adapter):
    """Labels of which each needs blocks of its own, after more texts than are read at once, which begin in their own way."""
    texts = [f"{at} once upon a time {one}" for one in range(9)]
    labels = [f"{one} " + "the fox and the hen " * 10 for one in range(4)]
    settings = {"labels": labels, "labelling": {"instruction": str(at)}, "shots": [], "raw": True}
    beside = {"adapter": adapter} if adapter else {}
    return {"do": "label", "inputs": texts, **settings, **beside}


@pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))
def test_what_is_held_beside_texts_is_planned(tmp_path, monkeypatch):
    hands = load({**ORDER, "adapters": {"red": adapter(tmp_path / "red")}}, lambda event: None)
    made, held = [], [0]
    begin = Cached.__init__

    def count(self, packed, blocks):
        begin(self, packed, blocks)
        made.append(weakref.ref(self))
        there = [one for one in (ref() for ref in made) if one is not None]
        held.append(sum(one.blocks for one in there) * BLOCK * packed.kept_bytes)
        assert len(there) <= 3, "those of the model's scorer, of the adapter's and of vectors"

    monkeypatch.setattr(Cached, "__init__", count)

    async def all_at_once():
        await asyncio.gather(
            *(ask(hands, labelled(at, name)) for at, name in enumerate(("", *["red"] * 3))),
            ask(hands, {"do": "embed", "inputs": ["a"] * 200}),
            ask(hands, {"do": "embed", "inputs": ["a fox " * 100] * 20}),
        )

    try:
        asyncio.run(all_at_once())
    finally:
        hands.close()
    planned = hands.facts["beside_bytes"]
    assert planned / 10 < max(held) <= planned


@pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))
def test_an_adapter_s_labels_leave_nothing(tmp_path, monkeypatch):
    hands = load({**ORDER, "adapters": {"red": adapter(tmp_path / "red")}}, lambda event: None)
    kept = []
    own = lanes.Lanes.score

    def note(self, planted):
        if self.adapter != -1:
            kept.append(weakref.ref(self._cached))
        return own(self, planted)

    monkeypatch.setattr(lanes.Lanes, "score", note)

    async def while_it_is_sent():
        answer = hands.do(labelled(0, "red"))
        await anext(answer)
        await ask(hands, {"do": "state"})
        assert kept and not any(one() for one in kept)
        await answer.aclose()

    try:
        asyncio.run(while_it_is_sent())
    finally:
        hands.close()
