"""What a tenant may hold and do, and that a flood of one takes nothing of another's guarantee."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Generate, ImportPast, Sample, SessionPast
from engine.blocks import BlockPool
from engine.config import EngineConfig, Quota
from engine.engine import Engine
from engine.errors import InvalidInput, LengthExceeded, PoolExhausted, QuotaExceeded, Refused
from engine.shares import Shares
from tests.engine.houses import Decoders
from tests.fakes import DECODER, FakeRunner


def refused(append_error: BaseException | None) -> float:
    """When to come back, as a refusal says."""
    assert isinstance(append_error, Refused)
    assert append_error.retry_after > 0
    return append_error.retry_after


# Counts


def test_sessions_are_counted_by_tenant_and_come_back() -> None:
    house = Decoders(quota=Quota(sessions=2), quotas={"big": Quota(sessions=3)})
    first = house.open("a", 3)
    house.engine.fork(first, tenant="a")
    with pytest.raises(QuotaExceeded, match=r"2 sessions and 1 more pass the quota of 2; delete one"):
        house.open("a")
    with pytest.raises(QuotaExceeded):
        house.engine.fork(first, tenant="a")
    for _ in range(2):
        house.open("b")
    big = house.open("big", 3)
    with pytest.raises(QuotaExceeded, match="1 sessions and 3 more"):  # all of them or none
        house.engine.fork(big, tenant="big", count=3)
    assert len(house.engine.fork(big, tenant="big", count=2)) == 2
    house.check()
    house.engine.delete_session(first, "a")
    house.open("a")


def test_a_refusal_says_when_the_next_session_expires() -> None:
    house = Decoders(quota=Quota(sessions=2), wait_seconds=7.0)
    house.open("a")
    with pytest.raises(QuotaExceeded) as error:
        house.open("a", ttl_seconds=40) and house.open("a")
    assert refused(error.value) == 40
    house.later(30)
    with pytest.raises(QuotaExceeded) as error:
        house.open("a")
    assert refused(error.value) == 10
    house.later(10)
    house.open("a")  # and it was true
    with pytest.raises(QuotaExceeded) as error:
        house.open("a")
    assert refused(error.value) == 7  # none expires: only the tenant can make room


def test_appends_that_run_or_wait_are_counted() -> None:
    house = Decoders(quota=Quota(concurrent_appends=2))
    one, two, three = (house.open("a") for _ in range(3))
    other = house.open("b")
    first = house.submit(one, 3, "a")
    house.submit(two, 3, "a")
    with pytest.raises(QuotaExceeded, match="2 appends that run or wait and 1 more pass the quota of 2"):
        house.submit(three, 3, "a")
    house.submit(other, 3, "b")
    house.check()
    house.run()
    assert first.future.result(0).valid_length == [3]
    house.submit(three, 3, "a")
    house.engine.delete_session(one, "a")
    house.engine.delete_session(three, "a")  # while it appends
    house.submit(two, 1, "a")
    house.run()


def test_tenants_who_left_are_forgotten() -> None:
    """By what it shows: nothing is counted for them, whatever they did."""
    house = Decoders(quota=Quota(positions_per_minute=60))
    for number in range(50):
        tenant = f"t{number}"
        session = house.open(tenant, 3)
        house.later(10)
        house.engine.delete_session(session, tenant)
    house.run()
    house.check()
    assert house.engine.capacity("t1").use.sessions == 0


# Blocks


def test_blocks_are_a_quota_and_a_shared_one_counts_once() -> None:
    house = Decoders(quota=Quota(blocks=4))
    session = house.open("a", 8)  # 2 blocks
    house.engine.fork(session, tenant="a", count=5)
    own = house.engine.capacity("a").models[0]
    assert (own.own, own.available) == (2, 2)
    other = house.open("a")
    append = house.submit(other, 9, "a")
    error = append.future.exception(0)  # at once, not after the deadline
    assert isinstance(error, QuotaExceeded)
    assert "2 blocks and 3 more pass the quota of 4" in str(error)
    assert house.append(other, 8, "a").valid_length == [8]
    house.append(house.open("b"), 16, "b")


def test_what_can_never_fit_the_quota_is_too_long_and_not_to_be_tried_again() -> None:
    house = Decoders(blocks=24, quotas={"a": Quota(blocks=4), "g": Quota(guaranteed_blocks=20)})
    for tenant, most in (("a", 4), ("b", 4), ("g", 24)):
        session = house.open(tenant)
        append = house.submit(session, most * 4 + 1, tenant)
        assert isinstance(append.future.exception(0), LengthExceeded)
        assert house.append(session, most * 4, tenant).valid_length == [most * 4]
        house.engine.delete_session(session, tenant)
        house.run()


def test_a_flood_never_takes_what_another_is_guaranteed() -> None:
    house = Decoders(blocks=24, quotas={"g": Quota(guaranteed_blocks=10)}, wait_seconds=5.0)
    flood = [house.submit(house.open("a"), 8, "a") for _ in range(20)]
    house.run()
    assert sum(append.future.done() for append in flood) == 7  # 14 blocks; the 10 stay free
    assert house.free() == 10
    for length in (16, 12, 12):  # 10 blocks, with the flood still waiting: at once, in the next turn
        append = house.submit(house.open("g"), length, "g")
        house.run()
        assert append.future.result(0).valid_length == [length]
    assert house.free() == 0
    more = house.submit(house.open("g"), 1, "g")  # beyond its guarantee it waits like anyone
    house.run()
    house.later(5)
    house.run()
    for append in (*flood[7:], more):
        assert isinstance(append.future.exception(0), PoolExhausted)
        refused(append.future.exception(0))


def test_what_the_guaranteed_gives_back_is_kept_for_it() -> None:
    house = Decoders(blocks=8, quotas={"g": Quota(guaranteed_blocks=4)})
    session = house.open("g", 16)
    house.open("a", 16)
    waits = house.submit(house.open("a"), 4, "a")
    house.engine.delete_session(session, "g")
    house.run()
    assert not waits.future.done()
    assert (house.free(), house.engine.capacity("a").models[0].available) == (4, 0)
    assert house.append(house.open("g"), 16, "g").valid_length == [16]


def test_only_who_lacks_blocks_is_refused_for_it() -> None:
    """However long the turns are: what is there to be had is not said to be missing."""
    house = Decoders(blocks=4, wait_seconds=1.0)
    session = house.open(positions=16)
    append = house.submit(house.open(), 16)
    house.engine.delete_session(session)  # freed, and not zeroed yet
    house.later(5)
    house.run()
    assert append.future.result(0).valid_length == [16]


def test_guarantees_must_fit_every_pool() -> None:
    with pytest.raises(InvalidInput, match="quotas: model decoder: 25 blocks are guaranteed, the pool has 24"):
        Decoders(quotas={"a": Quota(guaranteed_blocks=20), "b": Quota(guaranteed_blocks=5)})
    with pytest.raises(ValueError, match="a guarantee is for tenants by name"):
        EngineConfig(quota=Quota(guaranteed_blocks=1))
    with pytest.raises(ValueError, match="blocks must be at least guaranteed_blocks"):
        Quota(blocks=3, guaranteed_blocks=4)
    with pytest.raises(ValueError, match="sessions must be at least 1"):
        Quota(sessions=0)


TENANTS = ("a", "b", "g", "h")


@given(st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(0, 6), st.booleans()), max_size=60))
def test_shares_hold_in_any_order(moves: list[tuple[str, int, bool]]) -> None:
    """Against the words: a guaranteed tenant can always take up to its guarantee; nobody passes its quota."""
    quotas = {"g": Quota(guaranteed_blocks=5), "h": Quota(guaranteed_blocks=3, blocks=6), "b": Quota(blocks=4)}
    pool = BlockPool(21, Shares(20, EngineConfig(quotas=quotas)))
    held: dict[str, list[int]] = {tenant: [] for tenant in TENANTS}
    for tenant, count, gives_back in moves:
        if gives_back:
            pool.release(held[tenant][:count])
            del held[tenant][:count]
        else:
            kept = sum(
                max(0, quotas[other].guaranteed_blocks - len(held[other])) for other in ("g", "h") if other != tenant
            )
            most = quotas.get(tenant, Quota()).blocks
            fits = count <= pool.free - kept and (most is None or len(held[tenant]) + count <= most)
            taken = pool.take(count, tenant)
            assert (taken is not None) == (fits or count == 0)
            held[tenant] += taken or []
        pool.check(held.items())
        for tenant in ("g", "h"):
            assert pool.available(tenant) >= quotas[tenant].guaranteed_blocks - len(held[tenant])


# Positions a minute


def test_positions_are_worked_off_at_their_rate_and_the_refusal_says_when() -> None:
    house = Decoders(blocks=60, quota=Quota(positions_per_minute=60))
    session, other = house.open("a"), house.open("b")
    house.append(session, 50, "a")  # a minute's worth may come at once
    error = house.submit(session, 20, "a").future.exception(0)
    assert isinstance(error, QuotaExceeded)
    assert refused(error) == pytest.approx(10)
    house.append(other, 50, "b")
    house.later(9.9)
    again = house.submit(session, 20, "a").future.exception(0)
    assert refused(again) == pytest.approx(0.1)
    house.later(0.1)
    house.append(session, 20, "a")


def test_more_than_a_minutes_worth_starts_when_nothing_is_owed_and_is_worked_off_afterwards() -> None:
    house = Decoders(blocks=60, quota=Quota(positions_per_minute=60))
    session = house.open()
    house.append(session, 1)
    assert refused(house.submit(session, 120).future.exception(0)) == pytest.approx(1)
    house.later(1)
    house.append(session, 120)
    assert refused(house.submit(session, 1).future.exception(0)) == pytest.approx(61)
    house.later(61)
    house.append(session, 1)


def test_what_never_ran_is_not_owed_and_what_ran_is() -> None:
    house = Decoders(blocks=4, quota=Quota(positions_per_minute=600))
    keeps = house.open(positions=16)
    waits = house.submit(house.open(), 8)
    assert house.engine.capacity().use.owed == 24
    house.later(5)
    house.run()
    assert isinstance(waits.future.exception(0), PoolExhausted)
    assert house.engine.capacity().use.owed == 0  # 16 were worked off, 8 given back
    house.engine.delete_session(keeps)
    house.runner.poison = 3
    fails = house.submit(house.open(), 4)
    house.run()
    assert fails.future.exception(0) is not None
    assert house.engine.capacity().use.owed == 4
    deleted = house.open()
    house.submit(deleted, 4)
    house.engine.delete_session(deleted)
    house.run()
    assert house.engine.capacity().use.owed == 4


def test_generated_tokens_are_owed_as_they_come_and_end_nothing() -> None:
    house = Decoders(quota=Quota(positions_per_minute=12))
    session = house.open(positions=4)
    generate = Generate(session, 20, sample=Sample())
    house.engine.submit(generate)
    house.run()
    assert len(generate.future.result(0).token_ids[0]) == 20
    assert house.engine.capacity().use.owed == 24
    more = Generate(session, 1, sample=Sample())
    house.engine.submit(more)
    assert refused(more.future.exception(0)) == pytest.approx((24 + 1 - 12) * 5)


def test_an_import_is_an_append_to_a_quota() -> None:
    house = Decoders(quota=Quota(blocks=2, positions_per_minute=60))
    session, length = house.open(), 9
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in DECODER.past_tensors(1, length).items()}
    past = SessionPast(arrays, [length], "decoder", "fake")
    load = ImportPast(session, past)
    house.engine.submit(load)
    assert isinstance(load.future.exception(0), LengthExceeded)
    past = SessionPast(arrays, [8], "decoder", "fake")
    load = ImportPast(session, past)
    house.engine.submit(load)
    house.run()
    assert load.future.result(0).valid_length == [8]
    assert house.engine.capacity().use.owed == 8


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 7.0, 40.0]), st.integers(1, 90)), max_size=30))
def test_the_rate_against_a_plain_bucket(arrivals: list[tuple[float, int]]) -> None:
    rate, owed = 60, 0.0
    house = Decoders(blocks=900, quota=Quota(positions_per_minute=rate), token_budget=512)
    for wait, n in arrivals:
        house.later(wait)
        owed = max(0.0, owed - wait * rate / 60)
        append = house.submit(house.open(), n)
        house.run()
        if owed + min(n, rate) <= rate + 1e-9:
            append.future.result(0)
            owed += n
        else:
            seconds = refused(append.future.exception(0))
            assert math.isclose(seconds, (owed + min(n, rate) - rate) * 60 / rate, abs_tol=1e-6)


# What is shown


def test_capacity_shows_the_callers_and_nobody_elses() -> None:
    own = Quota(sessions=5, blocks=10, positions_per_minute=600, concurrent_appends=3, guaranteed_blocks=4)
    house = Decoders(quotas={"a": own})
    house.open("a", 5, pinned=True)
    house.open("b", 20)
    house.submit(house.open("a"), 2, "a")
    shown = house.engine.capacity("a")
    assert (shown.quota, shown.models[0].own) == (own, 2)
    assert (shown.use.sessions, shown.use.pinned, shown.use.appends, shown.use.owed) == (2, 1, 1, 7)
    shown = house.engine.capacity("b")
    assert (shown.quota, shown.models[0].own) == (Quota(), 5)
    assert (shown.use.sessions, shown.use.pinned, shown.use.appends, shown.use.owed) == (1, 0, 0, 0)
    house.run()


def test_models_have_pools_of_their_own() -> None:
    runners = [FakeRunner(DECODER, 9, 4)]
    engine = Engine(runners, EngineConfig(block_size=4, quotas={"a": Quota(guaranteed_blocks=8)}))
    assert engine.capacity("a").models[0].available == 8
    assert engine.capacity("b").models[0].available == 0
