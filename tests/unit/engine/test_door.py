"""The door: each who waits at it gets what the bare engine writes, whoever comes, leaves, dawdles or fails beside them."""

import asyncio
import gc
import random
from contextlib import suppress
from threading import Event, Thread

import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.engine.door import Busy, Closed, Door
from luthier.engine.engine import Engine
from luthier.engine.generate import add_answer, by_prompt, completed
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model
from writing import endless, prompts

SHORT = Sampling(max_tokens=6)
# Longer than any test takes: a text that is not let go of is seen to run.
LONG = Sampling(max_tokens=30_000, ignore_stop=True)


def at_door(body, model, room=4096, guessed=32, streams=32, **settings):
    """What `body` makes of a door, which it leaves with nothing held."""
    engine = Engine(model, room, guessed=guessed, streams=streams)
    with Door(engine, **settings) as door:
        found = asyncio.run(body(door))
        assert not door._open
    assert engine.blocks.used == 0 and not engine.busy and not door._thread.is_alive()
    return found


def boundless(family="llama"):
    model = endless(family)
    model.spec = model.spec.model_copy(update={"max_length": 10**6})
    return model


def held(engine):
    return engine.blocks.used, engine.busy


def alone(model, prompt, sampling):
    engine = Engine(model, 4096)
    requests = [add_answer(engine, prompt, sampling, 0, which) for which in range(sampling.n)]
    engine.run()
    return by_prompt([completed(model, one, sampling) for one in requests], sampling.n)[0]


async def gathered(answer):
    """The pieces of each answer put together."""
    found = {}
    async for piece in answer:
        text, ids, logs, finish = found.get(piece.which, ("", (), (), None))
        assert finish is None and (piece.text or piece.finish)
        found[piece.which] = text + piece.text, ids + piece.ids, logs + (piece.logprobs or ()), piece.finish
    return [found[which] for which in range(len(found))]


def parts(completion):
    """The same of a completion."""
    return [(one.text, one.ids, one.logprobs or (), one.finish) for one in (completion, *completion.others)]


MIXED = [
    {},
    {"max_tokens": 25},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.2, "seed": 4, "n": 3, "logprobs": 1},
    {"temperature": 0.8, "seed": 5, "top_p": 0.9, "n": 2},
    {"logprobs": 2},
    {"prompt_logprobs": True, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 6, "stop": (" the", "e", "\n"), "min_tokens": 3},
    {"stop_ids": tuple(range(0, 4000, 3)), "min_tokens": 2},
]


@pytest.mark.parametrize("seed", range(2))
def test_many_texts_that_come_and_go_are_those_of_the_bare_engine(seed):
    model, draw = load_model("mini"), random.Random(seed)
    given = []
    for _ in range(50):
        text = draw.choice(("Once upon a time", "The parcel is", "北京", "a" * draw.randrange(1, 60), "1 + 1 ="))
        sampling = Sampling(**{"max_tokens": 12, **draw.choice(MIXED)})
        given.append((tuple(model.renderer.prompt(text, raw=True)), sampling, draw.choice(WAYS), draw.randrange(1, 6)))
    right = {}
    for prompt, sampling, *_ in given:
        key = prompt, repr(sampling)
        if key not in right:
            right[key] = alone(model, prompt, sampling)

    async def one(door, at, way, count):
        prompt, sampling, *_ = given[at]
        settings = {"tenant": "abc"[at % 3], "priority": at % 2, "salt": "xy"[at % 5 == 0]}
        return await way(door, prompt, sampling, settings, count)

    async def body(door):
        tasks = [asyncio.create_task(one(door, at, way, count)) for at, (_, _, way, count) in enumerate(given)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert await door.ask(held) == (0, False)
        return found

    found = at_door(body, model, streams=16, waiting=1000)
    kept = 0
    for (prompt, sampling, way, _), made in zip(given, found):
        if made is None or isinstance(made, asyncio.CancelledError):
            assert way not in (streamed, whole)
            continue
        expected = right[prompt, repr(sampling)]
        assert made == (expected if way in (whole, cancelled_whole) else parts(expected)), sampling
        kept += 1
    assert 25 <= kept < 50


async def streamed(door, prompt, sampling, settings, _):
    return await gathered(door.stream(prompt, sampling, **settings))


async def whole(door, prompt, sampling, settings, _):
    return await door.complete(prompt, sampling, **settings)


async def broken_off(door, prompt, sampling, settings, count):
    async for _ in door.stream(prompt, sampling, **settings):
        count -= 1
        if not count:
            break


async def cancelled(door, prompt, sampling, settings, count):
    with door.stream(prompt, sampling, **settings) as answer:
        async for _ in answer:
            count -= 1
            if not count:
                asyncio.current_task().cancel()
                await door.ask(held)


async def cancelled_whole(door, prompt, sampling, settings, count):
    task = asyncio.create_task(door.complete(prompt, sampling, **settings))
    for _ in range(count):
        await door.ask(held)
    task.cancel()
    return await task


WAYS = [streamed, streamed, whole, whole, broken_off, cancelled, cancelled_whole]


def test_a_storm_of_disconnects_leaves_nothing_behind():
    model, draw = boundless(), random.Random(0)

    async def read(door, prompt, way):
        answer = door.stream(prompt, LONG)
        if way == "never":
            return
        await anext(answer)
        if way == "wait":
            async for _ in answer:
                pass
        if way == "fail":
            with answer:
                raise KeyError("a reader")

    async def body(door):
        for _ in range(3):
            ways = [draw.choice(("wait", "never", "drop", "fail", "whole")) for _ in range(60)]
            tasks = [
                asyncio.create_task(door.complete(one, LONG) if way == "whole" else read(door, one, way))
                for one, way in zip(prompts([draw.randrange(1, 50) for _ in ways], draw.randrange(99)), ways)
            ]
            others = [task for task, way in zip(tasks, ways) if way in ("never", "drop", "fail")]
            await asyncio.gather(*others, return_exceptions=True)
            assert (await door.ask(held))[1]
            for task in tasks:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(one) for one in found} == {asyncio.CancelledError, type(None), KeyError}
            assert await door.ask(held) == (0, False)
            assert await door.complete([5, 6, 7], SHORT) == right

    right = alone(model, [5, 6, 7], SHORT)
    at_door(body, model, room=2**16, streams=64)


def test_leave_ends_a_wait_too():
    async def body(door):
        answer = door.stream([5, 6], LONG)
        reading = asyncio.create_task(gathered(answer))
        await door.ask(held)
        answer.leave()
        ((_, ids, _, finish),) = await reading or [("", (), (), None)]
        assert finish is None and len(ids) < 30_000
        assert await door.ask(held) == (0, False)

    at_door(body, boundless(), room=2**16)


def test_texts_of_a_loop_that_is_gone_are_let_go():
    async def begin(door):
        answer = door.stream([5, 6], LONG)
        await anext(answer)
        return answer

    async def idle(door):
        while (await door.ask(held))[1]:
            pass

    with Door(Engine(boundless(), 2**16)) as door:
        answer = asyncio.run(begin(door))
        asyncio.run(idle(door))
    assert answer._writing.requests[0].finish == "abort"


def test_a_slow_reader_keeps_nobody_waiting_and_misses_nothing():
    model = endless("qwen3")
    given = prompts((3, 9, 20, 40))
    long = Sampling(max_tokens=60)

    async def body(door):
        slow = door.stream(given[0], Sampling(max_tokens=40))
        first = await anext(slow)
        others = await asyncio.gather(*(door.complete(one, long) for one in given[1:]))
        rest = [piece async for piece in slow]
        return first, others, rest

    first, others, rest = at_door(body, model)
    assert others == [alone(model, one, long) for one in given[1:]]
    expected = alone(model, given[0], Sampling(max_tokens=40))
    assert first.text + "".join(one.text for one in rest) == expected.text
    assert first.ids + sum((one.ids for one in rest), ()) == expected.ids
    assert len(rest) == 1 and rest[0].finish == "length"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_a_tap_takes_and_what_it_leaves_is_the_answer(share):
    model, draw = endless("llama"), random.Random(0)
    ways = [*MIXED[:-1], {"stop_ids": tuple(range(0, 400, 30))}]
    asked = [(given, Sampling(**{"max_tokens": 30, **one})) for given, one in zip(prompts([5] * len(ways)), ways)]
    tapped = []

    async def read(door, given, sampling):
        found = []
        with door.stream(given, sampling) as answer:

            def tap(piece):
                assert piece.finish is None
                if draw.random() < share:
                    found.append(piece)
                    tapped.append(piece)
                    return True
                return False

            answer.tap = tap
            async for piece in answer:
                found.append(piece)
        return await gathered(_each(found))

    async def body(door):
        return await asyncio.gather(*(read(door, *one) for one in asked))

    found = at_door(body, model)
    assert found == [parts(alone(model, *one)) for one in asked]
    assert bool(tapped) == bool(share)


async def _each(pieces):
    for one in pieces:
        yield one


def test_a_tap_that_fails_ends_its_own_answer_alone():
    model = endless("llama")
    first, second = prompts((3, 9))

    async def read(door, given, tap):
        with door.stream(given, Sampling(max_tokens=20)) as answer:
            answer.tap = tap
            return "".join([piece.text async for piece in answer])

    async def body(door):
        return await asyncio.gather(
            read(door, first, lambda piece: 1 / 0), read(door, second, lambda piece: False), return_exceptions=True
        )

    failed, whole = at_door(body, model)
    assert isinstance(failed, ZeroDivisionError) and whole == alone(model, second, Sampling(max_tokens=20)).text


async def stopped(door):
    """Keep the engine's thread between two steps until the event is set."""
    reached, gate, loop = asyncio.Event(), Event(), asyncio.get_running_loop()

    def stop(_):
        loop.call_soon_threadsafe(reached.set)
        gate.wait()

    asking = asyncio.create_task(door.ask(stop))
    await reached.wait()
    return gate, asking


def test_more_than_may_wait_is_refused_at_once():
    async def body(door):
        first = door.stream([5], Sampling(max_tokens=90))
        await anext(first)
        gate, asking = await stopped(door)
        waiting = [door.stream([5, 6, at], SHORT) for at in range(3)]
        for _ in range(2):
            with pytest.raises(Busy, match="3 texts with 9 tokens to read wait already; ask again later") as busy:
                door.stream([5], SHORT)
            assert (busy.value.texts, busy.value.tokens) == (3, 9)
        with pytest.raises(Busy):
            await door.complete([5], SHORT)
        waiting.pop().leave()
        gate.set()
        await asking
        await gathered(first)
        # It has left, so that another may come.
        waiting.append(door.stream([7], SHORT))
        found = [await gathered(one) for one in waiting]
        gate, asking = await stopped(door)
        waiting = [door.stream([5] * 10, SHORT), door.stream([6] * 9, SHORT)]
        with pytest.raises(Busy, match="2 texts with 19 tokens"):
            door.stream([5, 6], SHORT)
        gate.set()
        await asking
        return found + [await gathered(one) for one in waiting]

    found = at_door(body, endless(), streams=1, waiting=3, waiting_tokens=20)
    assert [len(ids) for ((_, ids, _, _),) in found] == [6] * 5


def test_what_could_never_wait_is_said_to_be_so():
    async def body(door):
        with pytest.raises(
            ConfigError, match="1 texts with 21 tokens to read are asked for at once, and at most 3 with 20"
        ):
            door.stream([5] * 21, SHORT)
        with pytest.raises(ConfigError, match="4 texts with 4 tokens"):
            await door.complete([5], Sampling(n=4, temperature=1.0))

    at_door(body, endless(), waiting=3, waiting_tokens=20)


def test_what_matters_more_comes_first_and_prompts_are_shared_under_a_salt_alone():
    (start,) = prompts((70,))

    async def body(door):
        gate, asking = await stopped(door)
        answers = [door.stream([5, at], SHORT, priority=at // 2, tenant="aba"[at % 3]) for at in range(4)]
        order = []

        async def one(at):
            await answers[at].whole()
            order.append(at)

        gate.set()
        await asyncio.gather(asking, *map(one, range(4)))
        reused = []
        for salt in ("x", "x", "y"):
            answer = door.stream(start, SHORT, salt=salt)
            await answer.whole()
            reused.append(answer._writing.requests[0].reused)
        return order, reused

    order, reused = at_door(body, endless(), streams=1)
    # When 0 and 1 are left, tenant a was served twice.
    assert order == [2, 3, 1, 0] and reused == [0, 64, 0]


def test_one_that_fails_fails_alone():
    model = endless()
    everything = tuple(range(model.network.get_input_embeddings().weight.shape[0]))

    async def body(door):
        return await asyncio.gather(
            door.complete([5, 6], SHORT),
            gathered(door.stream([5, 7], Sampling(max_tokens=9, min_tokens=5, stop_ids=everything))),
            door.complete([5, 8], Sampling(max_tokens=9, min_tokens=5, stop_ids=everything)),
            gathered(door.stream([], SHORT)),
            door.complete(prompts((128,))[0], SHORT),
            door.complete([5], Sampling(beams=2)),
            door.complete([5], SHORT, adapter="one"),
            door.complete([5, 9], SHORT),
            return_exceptions=True,
        )

    first, *errors, last = at_door(body, model)
    assert (first, last) == (alone(model, [5, 6], SHORT), alone(model, [5, 9], SHORT))
    assert [type(one) for one in errors] == [ConfigError, ConfigError, DataError, DataError, ConfigError, ConfigError]
    assert "leave no token that may come" in str(errors[0]) and "beams" in str(errors[4])


def test_one_of_several_answers_that_fails_ends_them_all(monkeypatch):
    async def body(door):
        answer = door.stream([5, 6], LONG.model_copy(update={"n": 3, "temperature": 1.0}))
        await anext(answer)

        def fail(_):
            raise ValueError("no number")

        def break_one(_):
            answer._writing.requests[1].draw = fail

        await door.ask(break_one)
        with pytest.raises(ValueError, match="no number"):
            await gathered(answer)
        assert await door.ask(held) == (0, False)

    at_door(body, boundless(), room=2**17)


class Boom(BaseException):
    pass


@pytest.mark.parametrize("error", [Boom("at work"), ValueError("at work")], ids=repr)
def test_an_error_of_the_engine_itself_reaches_all_who_wait_and_all_who_come(error):
    engine = Engine(boundless(), 2**16)
    step, broken = engine.step, Event()

    def fail():
        if broken.is_set():
            raise error
        return step()

    engine.step = fail

    async def body(door):
        answers = [door.stream([5, at], LONG) for at in range(4)]
        for one in answers:
            await anext(one)
        tasks = [asyncio.create_task(gathered(one)) for one in answers]
        tasks += [asyncio.create_task(door.complete([5, at], LONG)) for at in range(4)]
        await door.ask(held)
        broken.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in found] == [Closed] * 8
        assert all("the engine stopped at an error of its own" in str(one) and "at work" in str(one) for one in found)
        assert all(one.__cause__ is error for one in found)
        for late in (door.complete([5], SHORT), door.ask(held)):
            with pytest.raises(Closed, match="at work") as closed:
                await late
            assert closed.value.__cause__ is error
        with pytest.raises(Closed, match="at work"):
            door.stream([5], SHORT)

    with Door(engine) as door:
        asyncio.run(body(door))
    assert engine.blocks.used == 0 and not engine.busy


def test_closing_writes_what_is_there_to_its_end():
    model = endless()
    given = prompts((3, 20, 40, 9))

    async def body(door):
        tasks = [asyncio.create_task(door.complete(one, Sampling(max_tokens=50))) for one in given]
        streams = [door.stream(one, Sampling(max_tokens=50)) for one in given]
        await door.ask(held)
        await asyncio.to_thread(door.close)
        with pytest.raises(Closed, match="the engine is closed, and nothing more is written"):
            door.stream([5], SHORT)
        with pytest.raises(Closed):
            await door.ask(held)
        return await asyncio.gather(*tasks), [await gathered(one) for one in streams]

    found, streams = at_door(body, model, streams=2)
    assert found == [alone(model, one, Sampling(max_tokens=50)) for one in given]
    assert streams == [parts(one) for one in found]


def test_closing_without_draining_ends_those_who_read():
    async def body(door):
        answers = [door.stream([5, at], LONG) for at in range(4)]
        for one in answers[:2]:
            await anext(one)
        whole = asyncio.create_task(door.complete([5, 9], LONG))
        await door.ask(held)
        door.close(drain=False)
        for one in answers:
            with pytest.raises(Closed, match="closed before this was written to its end"):
                await gathered(one)
        with pytest.raises(Closed):
            await whole

    at_door(body, boundless(), room=2**17, streams=2)


def test_an_exception_that_leaves_the_door_ends_what_is_written():
    engine = Engine(boundless(), 2**16)
    with pytest.raises(KeyError), Door(engine) as door:

        async def body():
            answer = door.stream([5], LONG)
            await anext(answer)
            return answer

        answer = asyncio.run(body())
        raise KeyError("outside")
    assert engine.blocks.used == 0 and not engine.busy and answer._writing.requests[0].finish == "abort"


def test_a_thread_without_a_loop_has_one_for_a_moment():
    model = endless()
    given, found = prompts((3, 20, 40, 9)), {}
    with Door(Engine(model, 4096)) as door:
        threads = [
            Thread(target=lambda at=at: found.__setitem__(at, asyncio.run(door.complete(given[at], SHORT))))
            for at in range(4)
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert [found[at] for at in range(4)] == [alone(model, one, SHORT) for one in given]


def test_nothing_is_stepped_where_nothing_is_written():
    engine = Engine(endless(), 512, guessed=0)
    step, steps = engine.step, []
    engine.step = lambda: steps.append(1) or step()

    async def body(door):
        for _ in range(3):
            await door.ask(held)
        assert not steps
        await door.complete([5, 6], SHORT)
        for _ in range(3):
            await door.ask(held)
        assert len(steps) == 6
        with suppress(DataError):
            await door.complete([], SHORT)
        assert len(steps) == 6
        with pytest.raises(ZeroDivisionError):
            await door.ask(lambda _: 1 / 0)

    with Door(engine) as door:
        asyncio.run(body(door))
        gc.collect()
