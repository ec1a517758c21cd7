"""Tenants share: nobody waits behind another's thousand texts, and what each is given stays within a bound."""

import random
from collections import Counter
from itertools import combinations

import pytest

from luthier.engine.blocks import Blocks, names_of
from luthier.engine.engine import Engine
from luthier.engine.numbers import numbers_of
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling
from luthier.engine.schedule import Schedule
from luthier.models.pages import BLOCK
from writing import endless, prompts


def ended(engine):
    """The texts in the order in which they ended."""
    found = []
    engine.run(lambda told: found.extend(one for one in told if one.finish))
    return found


def test_one_text_does_not_wait_behind_a_thousand_of_another():
    engine, sampling = Engine(endless(), 4096, streams=2), Sampling(max_tokens=2)
    many = [engine.add([5, at % 300, at // 300], sampling, tenant="many") for at in range(1000)]
    engine.step()
    one = engine.add([9, 9, 9], sampling, tenant="one")
    engine.step()
    engine.step()
    assert one.written and [at for at, other in enumerate(many) if other.written] == [0, 1, 2]
    for other in many:
        engine.abort(other)
    assert ended(engine) == [one] and engine.blocks.used == 0


def test_tenants_that_come_at_once_take_turns_by_tokens():
    engine = Engine(endless(), 4096, streams=1)
    for at, size in enumerate((60, 60, 60)):
        engine.add(prompts((size,), at)[0], Sampling(max_tokens=1), tenant="long")
    for at in range(20):
        engine.add([7, at, at], Sampling(max_tokens=7), tenant="short")
    order = "".join(one.tenant[0] for one in ended(engine))
    assert order == "l" + "s" * 7 + "l" + "s" * 6 + "l" + "s" * 7


def test_a_higher_priority_comes_first_whoever_was_served_less():
    engine, sampling = Engine(endless(), 1024, streams=1), Sampling(max_tokens=3)
    texts = [
        engine.add([5, at], sampling, tenant=tenant, priority=priority)
        for at, (tenant, priority) in enumerate((("a", 0), ("a", 1), ("a", 1), ("b", 0), ("a", 0)))
    ]
    assert [texts.index(one) for one in ended(engine)] == [1, 2, 3, 0, 4]


def test_what_was_not_used_while_away_is_not_saved_up():
    engine, sampling = Engine(endless(), 1024, streams=1, guessed=0), Sampling(max_tokens=3)
    engine.add([4, 4], sampling, tenant="b")
    ended(engine)
    for at in range(20):
        engine.add([5, at], sampling, tenant="a")
    for _ in range(31):
        engine.step()
    for at in range(5):
        engine.add([6, at], sampling, tenant="b")
    order = "".join(one.tenant for one in ended(engine))
    assert order[:10] in ("ababababab", "bababababa", "abbabababa")


def test_who_leaves_and_comes_back_at_once_keeps_what_it_was_served():
    engine = Engine(endless(), 1024, streams=1, guessed=0)
    engine.add([5, 5], Sampling(max_tokens=60), tenant="greedy")
    meek = [engine.add([6, at], Sampling(max_tokens=3), tenant="meek") for at in range(10)]
    for _ in range(60):
        engine.step()
    engine.add([5, 6], Sampling(max_tokens=60), tenant="greedy")
    assert ended(engine)[:10] == meek


def test_a_text_that_is_let_go_unread_and_what_another_had_read_cost_nothing():
    engine, sampling = Engine(endless(), 4096, streams=1), Sampling(max_tokens=2)
    (start,) = prompts((3 * BLOCK + 1,))
    engine.add(start, sampling)
    ended(engine)
    stay = [engine.add([5, 5], sampling, tenant="stay"), engine.add([5, 6], sampling, tenant="stay")]
    engine.abort(engine.add(prompts((90,), 1)[0], sampling, tenant="a"))
    reused = [engine.add([*start[:-1], at], sampling, tenant="a") for at in (7, 8)]
    assert ended(engine) == [stay[0], reused[0], reused[1], stay[1]]
    assert [one.reused for one in reused] == [3 * BLOCK, 3 * BLOCK]


def test_where_blocks_run_out_whoever_was_served_most_gives_up_its_own():
    engine, sampling = Engine(endless(), 4 * BLOCK, streams=4), Sampling(max_tokens=60)
    many = [engine.add(prompts((30,), at)[0], sampling, tenant="many") for at in range(3)]
    one = engine.add(prompts((30,), 9)[0], sampling, tenant="one")
    while not one.finish:
        engine.step()
        assert one.read > 0 or one.finish
    assert engine.schedule.preempted > 0 and not any(other.finish for other in many)
    ended(engine)
    assert engine.blocks.used == 0


@pytest.mark.parametrize("room", [4096, 160])
def test_what_is_written_does_not_depend_on_tenants(room):
    model, sampling = endless("qwen3"), Sampling(max_tokens=30, temperature=1.3)
    given = prompts((1, 40, 17, 3, 33, 64, 8))

    def write(tenants, **settings):
        engine = Engine(model, settings.pop("room", 4096), **settings)
        found = [engine.add(one, sampling, draw=numbers_of(at), tenant=tenants[at]) for at, one in enumerate(given)]
        engine.run()
        assert engine.blocks.used == 0
        return [one.written for one in found]

    assert write("abcabca", room=room, streams=3, tokens=24) == write("aaaaaaa")


@pytest.mark.parametrize("seed", range(8))
def test_what_tenants_with_texts_waiting_are_given_stays_within_the_bound(seed):
    """The schedule without a model: random texts of greedy and meek tenants."""
    draw = random.Random(seed)
    blocks = Blocks(24)
    schedule, kept = Schedule(blocks, streams=draw.choice((2, 6, 16)), tokens=draw.choice((16, 64))), 24 * BLOCK
    sizes = {tenant: (draw.choice((4, 40, 200)), draw.choice((2, 20, 100))) for tenant in "abc"}
    given, since, seen, number = Counter(), {}, set(), 0

    def add(tenant):
        nonlocal number
        prompt = tuple(draw.randrange(10**6) for _ in range(draw.randint(1, sizes[tenant][0])))
        room = draw.randint(1, sizes[tenant][1])
        names = tuple(names_of(prompt, ""))
        schedule.add(Request(prompt, Sampling(), room, number, lambda _: 0.0, tenant=tenant, names=names))
        number += 1

    for step in range(1500):
        for at, tenant in enumerate("abc"):
            # b and c come later, and each stays away for a while.
            away = step < 100 * at or (step // 150) % 7 == at + 2
            while not away and sum(one.tenant == tenant for one in schedule.waiting) < 3:
                add(tenant)
        before = {one: one.number in seen for one in schedule.waiting}
        planned = schedule.plan()
        for one, was_seen in before.items():
            if one in schedule.running and not was_seen:
                seen.add(one.number)
                given[one.tenant] += len(one.prompt)
        for one, count in planned:
            schedule.advance(one, count)
            if one.read == one.length:
                one.written.append(0)
                given[one.tenant] += 1
                if len(one.written) == one.room:
                    one.finish = "length"
                    schedule.finish(one)
        backlog = {one.tenant for one in schedule.waiting}
        for pair in combinations("abc", 2):
            if not backlog.issuperset(pair):
                since.pop(pair, None)
                continue
            start = since.setdefault(pair, [])
            start.append(given[pair[0]] - given[pair[1]])
            assert max(start) - min(start) <= 2 * kept
    assert min(given.values()) > 100
