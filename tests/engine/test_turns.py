"""Who is in the next batch: tenants in turn, steps before chunks, and nobody starves."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Append, Work
from engine.config import Quota
from engine.errors import PoolExhausted
from engine.session import Sequence, Session
from engine.turns import PATIENCE, Turns
from tests.engine.houses import Decoders


def batches(house: Decoders) -> list[dict[str, int]]:
    """Positions a session, of each batch."""
    return [
        dict(sum((Counter({session: stop - start}) for session, _, start, stop in batch), Counter()))
        for batch in house.runner.batches
    ]


def test_a_step_is_in_every_batch_of_anothers_prefill_which_advances_in_each() -> None:
    house = Decoders(blocks=400, token_budget=16)
    long, stepper = house.open("a"), house.open("b", 4)
    other = house.open("b", 4)
    house.runner.batches.clear()
    prefill = house.submit(long, 190, "a")
    while not prefill.future.done():
        steps = [house.submit(session, 1, "b", step=True) for session in (stepper, other)]
        assert house.engine.run_once()
        assert all(step.future.done() for step in steps)
    assert [batch[long] for batch in batches(house)] == [14] * 13 + [8]


def test_endless_steps_leave_a_prefill_its_part() -> None:
    """As many sessions step as a batch has rows and positions: a quarter is kept for the prefill."""
    house = Decoders(blocks=400, token_budget=16, max_rows=16)
    steppers = [house.open("b", 4) for _ in range(40)]
    long = house.open("a")
    house.runner.batches.clear()
    prefill = house.submit(long, 40, "a")
    waiting: dict[str, Append] = {}
    turns = 0
    while not prefill.future.done():
        for session in steppers:
            if session not in waiting or waiting[session].future.done():
                waiting[session] = house.submit(session, 1, "b", step=True)
        house.engine.run_once()
        house.check()
        turns += 1
    assert turns == 10
    assert [batch[long] for batch in batches(house)] == [4] * 10
    steps = Counter(session for batch in batches(house) for session in batch if session != long)
    assert (len(steps), sum(steps.values())) == (40, 120)
    assert max(steps.values()) - min(steps.values()) <= 2  # everybody about as often as anybody


def test_a_flood_of_one_tenants_steps_does_not_keep_anothers_out() -> None:
    house = Decoders(blocks=400, token_budget=16, max_rows=16)
    flood = [house.open("a", 4) for _ in range(60)]
    one = house.open("b", 4)
    house.run()
    house.runner.batches.clear()
    for session in flood:
        house.submit(session, 1, "a", step=True)
    for _ in range(3):
        step = house.submit(one, 1, "b", step=True)
        house.engine.run_once()
        assert step.future.done()
        assert len(house.runner.batches[-1]) == 16
    house.run()


def test_prefills_of_two_tenants_take_turns() -> None:
    house = Decoders(blocks=400, token_budget=8)
    first, second, other = house.open("a"), house.open("a"), house.open("b")
    appends = [house.submit(first, 40, "a"), house.submit(second, 40, "a"), house.submit(other, 24, "b")]
    house.run()
    order = [next(iter(batch)) for batch in batches(house)]
    assert order[:6] == [first, other, first, other, first, other]
    assert order[6:] == [first, first, second, second, second, second, second]
    assert all(append.future.result(0) for append in appends)


def test_who_is_passed_over_too_often_comes_first() -> None:
    """A session of more rows than steps ever leave room for."""
    house = Decoders(blocks=400, token_budget=64, max_rows=16)
    steppers = [house.open("b", 4) for _ in range(20)]
    wide = house.engine.create_session("decoder", batch_size=16).id
    append = Append(wide, {"token_ids": np.ones((16, 3), dtype=np.int64)})
    house.engine.submit(append)
    turns = 0
    waiting: dict[str, Append] = {}
    while not append.future.done():
        for session in steppers:
            if session not in waiting or waiting[session].future.done():
                waiting[session] = house.submit(session, 1, "b", step=True)
        house.engine.run_once()
        turns += 1
        assert turns <= PATIENCE + 1
    assert turns == PATIENCE + 1
    house.run()


def test_half_admitted_prefills_cannot_wait_for_each_other() -> None:
    """Each fits, both do not: one holds all it needs or nothing, so it always ends and lets the other in."""
    house = Decoders(blocks=24, token_budget=8)
    sessions = [house.open("ab"[number % 2]) for number in range(6)]
    appends = [house.submit(session, 60, "ab"[number % 2]) for number, session in enumerate(sessions)]
    for _ in range(1000):
        if all(append.future.done() for append in appends):
            break
        if house.engine.run_once():
            house.check()
            running = [info for tenant in "ab" for info in house.engine.sessions(tenant) if info.blocks]
            assert all(info.blocks == 15 for info in running)
        else:
            done = [session for session, append in zip(sessions, appends, strict=True) if append.future.done()]
            tenant = "ab"[sessions.index(done[-1]) % 2]
            house.engine.delete_session(done[-1], tenant)
    assert [append.future.result(0).valid_length for append in appends] == [[60]] * 6


@given(st.lists(st.tuples(st.integers(1, 24), st.sampled_from("abc")), min_size=1, max_size=30), st.integers(1, 20))
def test_every_append_ends_by_its_deadline(appends: list[tuple[int, str]], budget: int) -> None:
    """In any mix of lengths and tenants: committed whole, or refused and nothing held."""
    house = Decoders(blocks=12, token_budget=budget, quotas={"c": Quota(guaranteed_blocks=4)})
    running = [(house.open(tenant), n, tenant) for n, tenant in appends]
    operations = [house.submit(session, n, tenant) for session, n, tenant in running]
    house.run()
    house.later(5)
    house.run()
    for (session, n, tenant), operation in zip(running, operations, strict=True):
        error = operation.future.exception(0)
        assert error is None or isinstance(error, PoolExhausted)
        info = house.engine.session(session, tenant)
        assert (info.valid_length, info.blocks) == (([n], -(-n // 4)) if error is None else ([0], 0))
    assert house.engine.idle


WORKS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([1, 1, 1, 9]), st.integers(1, 3)), max_size=30)


@given(WORKS)
def test_the_order_is_fair_and_keeps_everyones_own(drawn: list[tuple[str, int, int]]) -> None:
    """While tenants have works left in a class, none is ahead of another by more than one work's rows."""
    turns = Turns()
    queue = []
    for tenant, count, rows in drawn:
        session = Session("s", tenant, "m", 99, [Sequence() for _ in range(rows)], 0, 0)
        work = Work(session, {}, [count] * rows, None, None, 0)  # type: ignore[arg-type]  # neither is looked at
        work.done = [0] * rows
        queue.append(work)
        turns.arrived(work)
    first, long = turns.order(queue)
    order = [*first, *long]
    assert Counter(map(id, order)) == Counter(map(id, queue))
    for size in (1, 9):
        own = [work for work in order if work.new[0] == size]
        for tenant in "abcd":
            mine = [work for work in queue if work.session.tenant == tenant and work.new[0] == size]
            assert [work for work in own if work.session.tenant == tenant] == mine
        left = Counter(work.session.tenant for work in own)
        had: Counter[str] = Counter()  # rows
        for work in own:
            here = [tenant for tenant in left if left[tenant]]
            assert had[work.session.tenant] == min(had[tenant] for tenant in here)
            had[work.session.tenant] += len(work.new)
            left[work.session.tenant] -= 1
    kinds = [work.new[0] > 1 for work in order]
    assert all(one <= two for one, two in pairwise(kinds))


@pytest.mark.parametrize("newcomers", [1, 3])
def test_newcomers_never_keep_an_old_tenant_waiting(newcomers: int) -> None:
    """One row a batch, and fresh tenants in every turn: the old one waits for those who were there before it."""
    house = Decoders(blocks=400, max_rows=1)
    session = house.open("old", 4)
    arrived = ended = 0  # works of newcomers
    for _ in range(6):
        step = house.submit(session, 1, "old", step=True)
        ahead, turns = arrived - ended, 0
        while not step.future.done():
            for _ in range(newcomers):
                tenant = f"new {arrived}"
                house.submit(house.open(tenant), 1, tenant)
                arrived += 1
            house.engine.run_once()
            turns += 1
            ended += not step.future.done()
        assert turns <= ahead + 1
    house.run()


def guarded_house(positions: int) -> Decoders:
    quotas = {"g": Quota(guaranteed_blocks=40)}
    return Decoders(blocks=400, token_budget=64, max_rows=64, guard_positions=positions, quotas=quotas)


def test_while_a_guaranteed_tenant_works_others_have_a_small_part_of_each_batch() -> None:
    house = guarded_house(6)
    own = house.open("g", 4)
    longs = [house.open("a") for _ in range(3)]
    steppers = [house.open("b", 4) for _ in range(20)]
    house.later(2)  # as if it were not there
    house.runner.batches.clear()
    for session in longs:
        house.submit(session, 60, "a")
    house.engine.run_once()
    for _ in range(12):
        house.submit(own, 12, "g")
        for session in steppers:
            house.submit(session, 1, "b", step=True)
        house.engine.run_once()
    whole, *rest = batches(house)
    assert sum(whole.values()) == 64  # nobody to be quick for
    for batch in rest:
        assert batch.pop(own) == 12
        assert sum(batch.values()) == 6
    served = Counter(session for batch in rest for session in batch)
    assert set(served) == {*longs[1:], *steppers}  # nobody starves; the first long one has ended


def test_a_second_after_its_last_append_others_have_all_again() -> None:
    house = guarded_house(6)
    house.open("g", 4)
    house.runner.batches.clear()
    long = house.open("a")
    house.submit(long, 200, "a")
    house.later(0.9)
    house.engine.run_once()
    house.later(0.2)
    house.engine.run_once()
    assert [batch[long] for batch in batches(house)] == [6, 64]
