"""Which sessions go when blocks are short, and that none does when it is off."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BlockPool
from engine.config import EngineConfig, Quota
from engine.errors import PoolExhausted, QuotaExceeded, SessionGone
from engine.eviction import victims
from engine.session import Sequence, Session, SessionState
from engine.shares import Shares
from tests.engine.houses import Decoders


def full(quotas: dict[str, Quota] | None = None, **config: object) -> tuple[Decoders, list[str]]:
    """Six sessions of 4 blocks, a second apart: those of a, b, a, b, a, b. All 24 blocks are held."""
    house = Decoders(blocks=24, evict="lru", quotas=quotas or {}, **config)
    sessions = []
    for number in range(6):
        sessions.append(house.open("ab"[number % 2], 16))
        house.later(1)
    return house, sessions


def gone(house: Decoders, sessions: list[str]) -> dict[int, str]:
    reasons = {}
    for number, session_id in enumerate(sessions):
        try:
            house.engine.session(session_id, "ab"[number % 2])
        except SessionGone as error:
            reasons[number] = error.reason
    return reasons


def test_by_default_nobody_is_evicted() -> None:
    house = Decoders(blocks=4)
    first = house.open(positions=16)
    append = house.submit(house.open(), 1)
    house.run()
    house.later(5)
    house.run()
    assert isinstance(append.future.exception(0), PoolExhausted)
    assert house.engine.session(first).valid_length == [16]


def test_the_least_recently_used_of_its_own_goes_first_and_says_why() -> None:
    house, sessions = full()
    house.append(house.open("b"), 5, "b")
    assert gone(house, sessions) == {1: "evicted"}
    house.append(sessions[3], 4, "b")  # there were 2 left of the 4: one more is taken
    house.append(house.open("b"), 8, "b")
    assert gone(house, sessions) == {1: "evicted", 5: "evicted"}


def test_a_read_keeps_nobody_and_a_use_does() -> None:
    house, sessions = full()
    house.engine.session(sessions[0], "a")
    house.engine.update_session(sessions[1], "b")
    house.append(house.open("a"), 16, "a")
    house.append(house.open("b"), 16, "b")
    assert gone(house, sessions) == {0: "evicted", 3: "evicted"}


def test_others_go_when_the_own_do_not_suffice_but_not_below_their_guarantee() -> None:
    house, sessions = full({"b": Quota(guaranteed_blocks=8)})
    append = house.submit(house.open("a"), 64, "a")
    house.run()
    assert append.future.result(0).valid_length == [64]
    assert gone(house, sessions) == {0: "evicted", 1: "evicted", 2: "evicted", 4: "evicted"}
    assert house.engine.capacity("b").models[0].own == 8


def test_when_all_that_may_go_would_not_do_nobody_goes() -> None:
    house, sessions = full({"b": Quota(guaranteed_blocks=12)}, wait_seconds=2.0)
    pinned = sessions[0]
    house.engine.update_session(pinned, "a", pinned=True)
    append = house.submit(house.open("a"), 36, "a")  # 9 blocks; 8 are there to be had
    house.run()
    house.later(2)
    house.run()
    assert isinstance(append.future.exception(0), PoolExhausted)
    assert gone(house, sessions) == {}


def test_the_pinned_and_the_running_stay() -> None:
    house, sessions = full()
    house.engine.update_session(sessions[0], "a", pinned=True)
    busy = house.submit(sessions[2], 24, "a")  # needs 6 blocks of its own: the two of a's that may go give 4
    house.run()
    assert busy.future.result(0).valid_length == [40]
    assert gone(house, sessions) == {1: "evicted", 4: "evicted"}


def test_shared_blocks_free_nothing_until_their_last_holder_goes() -> None:
    house = Decoders(blocks=8, evict="lru")
    parent = house.open(positions=16)
    house.later(1)
    (child,) = house.engine.fork(parent)
    house.later(1)
    other = house.open(positions=16)
    house.engine.update_session(child.id, pinned=True)
    house.append(house.open(), 4)
    assert house.engine.session(parent).valid_length == [16]  # its blocks stay with the pinned child: it need not go
    with pytest.raises(SessionGone, match="evicted"):
        house.engine.session(other)


def test_nobody_is_evicted_for_what_a_quota_would_refuse_anyway() -> None:
    house, sessions = full({"a": Quota(blocks=12)})
    append = house.submit(house.open("a"), 4, "a")
    assert isinstance(append.future.exception(0), QuotaExceeded)
    assert gone(house, sessions) == {}


def test_a_session_that_becomes_idle_later_goes_then() -> None:
    house = Decoders(blocks=8, evict="lru", wait_seconds=60.0, token_budget=8)
    busy, waits = house.open(), house.open()
    first = house.submit(busy, 32)
    second = house.submit(waits, 4)
    house.engine.run_once()
    house.later(0.2)
    assert not second.future.done()
    house.run()
    house.later(0.2)
    house.run()
    assert (first.future.done(), second.future.result(0).valid_length) == (True, [4])
    with pytest.raises(SessionGone, match="evicted"):
        house.engine.session(busy)


SESSIONS = st.lists(
    st.tuples(st.sampled_from("abg"), st.integers(0, 4), st.booleans(), st.booleans(), st.booleans()), max_size=8
)


@given(SESSIONS, st.sampled_from("abg"), st.integers(1, 20))
def test_victims_suffice_and_are_no_more_than_needed(
    drawn: list[tuple[str, int, bool, bool, bool]], tenant: str, needed: int
) -> None:
    """Against the words: closing them gives what is needed, leaving out the last does not, nobody protected goes."""
    quotas = {"g": Quota(guaranteed_blocks=4)}
    pool = BlockPool(17, Shares(16, EngineConfig(quotas=quotas)))
    sessions: list[Session] = []
    for owner, blocks, pinned, runs, forks in drawn:
        family = [other for other in sessions if other.tenant == owner]
        sequence = Sequence()
        if forks and family:
            sequence.block_table.extend(family[-1].sequences[0].block_table)
            pool.share(sequence.block_table)
        else:
            sequence.block_table.extend(pool.take(blocks, owner) or [])
        age = float(len(sessions))
        session = Session(str(age), owner, "m", 99, [sequence], age, age, pinned=pinned)
        session.state = SessionState.RUNNING if runs else SessionState.IDLE
        sessions.append(session)
    before = {owner: pool.shares.used(owner) for owner in "abg"}
    chosen = victims(sessions, pool, tenant, needed)
    order = [(each.tenant != tenant, each.last_used_at) for each in chosen]
    assert all(one < two for one, two in pairwise(order))
    assert not any(each.pinned or each.state is SessionState.RUNNING for each in chosen)
    for each in chosen:
        pool.release(each.sequences[0].block_table)
        if each is chosen[-2:][0] and len(chosen) > 1:
            assert pool.available(tenant) < needed or chosen[-1] is each
    if chosen:
        assert pool.available(tenant) >= needed
    if tenant != "g":
        assert pool.shares.used("g") >= min(before["g"], 4)
