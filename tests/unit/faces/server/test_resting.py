"""Models that rest: the ones asked last stay loaded, the others are loaded when they are asked."""

import asyncio
from pathlib import Path

import pytest

import luthier
from asking import until_async
from luthier.faces.server.engines import Gone
from luthier.faces.server.settings import Serve
from luthier.faces.server.shelf import AWAKE, Shelf

MINI = Path(luthier.__file__).parent / "assets" / "mini"


def test_the_models_asked_last_stay_loaded(tmp_path):
    names = [str(tmp_path / f"model{i}") for i in range(AWAKE + 1)]
    for name in names:
        Path(name).symlink_to(MINI)

    async def work():
        shelf = Shelf(Serve(), lambda event: None)

        def states():
            return [shelf.find(name).process.state for name in names]

        try:
            for name in names:
                await shelf.load(name, rests=True)
            await until_async(lambda: states() == ["asleep", "ready", "ready"])
            first, second, _ = (shelf.find(name).process for name in names)
            assert first.facts["context"] == second.facts["context"] and await shelf.check() == {}
            # Whoever leaves while it loads does not keep the others from it.
            leaving = asyncio.create_task(first.ask("beat"))
            asking = [asyncio.create_task(first.ask("beat")) for _ in range(3)]
            await until_async(lambda: first.state == "loading")
            leaving.cancel()
            assert await asyncio.gather(*asking) == [{}] * 3
            await until_async(lambda: states() == ["ready", "asleep", "ready"])
            await shelf.load(names[0], "again", rests=True, facts={})
            assert shelf.find("again").process is first
        finally:
            await shelf.close()
        assert states() == ["stopped"] * 3

    asyncio.run(work())


def test_a_model_that_is_gone_is_said_each_time(tmp_path):
    async def work():
        shelf = Shelf(Serve(), lambda event: None)
        gone = await shelf.load(str(tmp_path / "gone"), rests=True, facts={})
        for _ in range(2):
            try:
                await gone.process.ask("beat")
            except Exception as err:
                assert "gone" in str(err) and gone.process.state == "asleep"
            else:
                raise AssertionError
        await shelf.close()

    asyncio.run(work())


def test_an_answer_that_is_stopped_is_not_said_to_be_started_again():
    async def work():
        shelf = Shelf(Serve(), lambda event: None)
        served = await shelf.load("mini")
        sampling = {"max_tokens": 400, "ignore_stop": True, "n": 8, "temperature": 1.5}
        parts = served.stream("write", text="Once", sampling=sampling, stream=True)
        await anext(parts)
        await shelf.close()
        with pytest.raises(Gone, match="the server is ending, or serves the model no longer"):
            async for _ in parts:
                pass

    asyncio.run(work())
