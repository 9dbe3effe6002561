"""How long a session lives: time to live, uses that put its end off, pins, tombstones."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import ExportPast, Truncate
from engine.config import Quota
from engine.errors import InvalidInput, Moved, QuotaExceeded, SessionGone, SessionNotFound
from engine.expiry import Expiry
from engine.session import Sequence, Session, SessionState
from tests.engine.houses import Decoders


def gone(house: Decoders, session_id: str) -> str:
    with pytest.raises(SessionGone) as refused:
        house.engine.session(session_id)
    return refused.value.reason


def export(house: Decoders, session_id: str) -> None:
    operation = ExportPast(session_id)
    house.engine.submit(operation)
    house.run()
    operation.future.result(0)


def truncate(house: Decoders, session_id: str) -> None:
    operation = Truncate(session_id, 2)
    house.engine.submit(operation)
    house.run()
    operation.future.result(0)


READS: dict[str, Callable[[Decoders, str], object]] = {
    "get": lambda house, session_id: house.engine.session(session_id),
    "list": lambda house, _: house.engine.sessions(),
    "capacity": lambda house, _: house.engine.capacity(),
    "export": export,
}
USES: dict[str, Callable[[Decoders, str], object]] = {
    "append": lambda house, session_id: house.append(session_id, 1),
    "fork": lambda house, session_id: house.engine.fork(session_id),
    "truncate": truncate,
    "update": lambda house, session_id: house.engine.update_session(session_id),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_read_does_not_put_the_end_off(read: Callable[[Decoders, str], object]) -> None:
    house = Decoders()
    session_id = house.open(positions=3, ttl_seconds=10)
    house.later(9)
    read(house, session_id)
    assert house.engine.session(session_id).expires_at == house.clock.now + 1
    house.later(1)
    assert gone(house, session_id) == "expired"  # and asking did not revive it:
    assert gone(house, session_id) == "expired"
    house.run()
    assert house.free() == 24


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_use_puts_the_end_off(use: Callable[[Decoders, str], object]) -> None:
    house = Decoders()
    session_id = house.open(positions=3, ttl_seconds=10)
    house.later(9)
    use(house, session_id)
    assert house.engine.session(session_id).expires_at == house.clock.now + 10
    house.later(9)
    house.run()
    assert house.engine.session(session_id).state == "idle"
    house.later(1)
    assert gone(house, session_id) == "expired"


def test_no_use_revives_what_has_expired() -> None:
    house = Decoders()
    session_id = house.open(positions=3, ttl_seconds=10)
    house.later(10)
    for use in USES.values():
        with pytest.raises(SessionGone, match="expired"):
            use(house, session_id)
    with pytest.raises(SessionGone, match="expired"):
        house.engine.update_session(session_id, ttl_seconds=None)


def test_an_expired_session_gives_its_blocks_back_on_the_next_turn() -> None:
    house = Decoders()
    house.open(positions=3, ttl_seconds=10)
    assert house.free() == 23
    house.later(10)
    house.engine.run_once()
    house.run()
    assert (house.free(), house.engine.sessions()) == (24, [])


def test_a_session_does_not_expire_while_it_runs() -> None:
    house = Decoders()
    session_id = house.open(ttl_seconds=1)
    append = house.submit(session_id, 20)
    for _ in range(3):  # chunks of 8
        house.later(2)
        assert house.engine.run_once()
    assert append.future.result(0).valid_length == [20]
    assert house.engine.session(session_id).expires_at == house.clock.now + 1


def test_an_update_changes_what_it_names_and_no_version() -> None:
    house = Decoders()
    session_id = house.open(positions=3, labels={"a": "1", "b": "2"}, ttl_seconds=10)
    before = house.engine.session(session_id)
    info = house.engine.update_session(session_id, labels={"a": None, "c": "3"})
    assert (info.labels, info.ttl_seconds, info.pinned) == ({"b": "2", "c": "3"}, 10, False)
    assert (info.version, info.valid_length) == (before.version, before.valid_length)
    info = house.engine.update_session(session_id, ttl_seconds=None, labels=None)
    assert (info.labels, info.ttl_seconds, info.expires_at) == ({}, None, None)
    info = house.engine.update_session(session_id, ttl_seconds=2.5)
    assert info.expires_at == house.clock.now + 2.5


def test_an_update_that_is_refused_changes_nothing() -> None:
    house = Decoders(quota=Quota(pinned=0))
    session_id = house.open(ttl_seconds=10)
    before = house.engine.session(session_id)
    house.later(1)
    many = {str(number): "" for number in range(33)}
    with pytest.raises(Moved):
        house.engine.update_session(session_id, expected_version=1, ttl_seconds=5)
    with pytest.raises(InvalidInput, match="labels: a session has 32 at most"):
        house.engine.update_session(session_id, ttl_seconds=5, labels=many)
    with pytest.raises(InvalidInput, match="ttl_seconds"):
        house.engine.update_session(session_id, ttl_seconds=0, labels={"a": "b"})
    with pytest.raises(QuotaExceeded, match="0 pinned sessions and 1 more pass the quota of 0"):
        house.engine.update_session(session_id, pinned=True, ttl_seconds=5, labels={"a": "b"})
    assert house.engine.session(session_id) == before


def test_a_pinned_session_never_expires_until_it_is_unpinned() -> None:
    house = Decoders()
    session_id = house.open(positions=3, ttl_seconds=10, pinned=True)
    house.later(1e6)
    house.run()
    assert house.engine.session(session_id).expires_at is None
    info = house.engine.update_session(session_id, pinned=False)
    assert info.expires_at == house.clock.now + 10
    house.later(10)
    assert gone(house, session_id) == "expired"


def test_pins_are_a_quota_and_come_back() -> None:
    house = Decoders(quota=Quota(pinned=2), quotas={"rich": Quota(pinned=3)})
    first, second, third = house.open(pinned=True), house.open(), house.open()
    house.engine.update_session(second, pinned=True)
    house.engine.update_session(second, pinned=True)  # is one already
    for refused in (lambda: house.open(pinned=True), lambda: house.engine.update_session(third, pinned=True)):
        with pytest.raises(QuotaExceeded):
            refused()
    house.check()
    (child,) = house.engine.fork(first)
    assert not child.pinned
    house.engine.delete_session(first)
    house.engine.update_session(third, pinned=True)
    for _ in range(3):
        house.open("rich", pinned=True)
    house.check()


def test_a_tombstone_stays_for_its_time() -> None:
    house = Decoders(tombstone_seconds=60.0)
    session_id = house.open()
    house.engine.delete_session(session_id)
    house.later(59)
    assert gone(house, session_id) == "deleted"
    house.later(1)
    with pytest.raises(SessionNotFound):
        house.engine.session(session_id)


def test_of_too_many_tombstones_the_oldest_go() -> None:
    house = Decoders(tombstones=2)
    sessions = [house.open() for _ in range(3)]
    for session_id in sessions:
        house.engine.delete_session(session_id)
    with pytest.raises(SessionNotFound):
        house.engine.session(sessions[0])
    assert [gone(house, session_id) for session_id in sessions[1:]] == ["deleted", "deleted"]


def test_an_id_may_be_taken_again_and_closed_again() -> None:
    house = Decoders()
    house.engine.create_session("decoder", session_id="a", ttl_seconds=5)
    house.later(5)
    house.engine.create_session("decoder", session_id="a")
    house.later(50)
    assert house.engine.session("a").state == "idle"
    house.engine.delete_session("a")
    assert gone(house, "a") == "deleted"


LIVES = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.sampled_from(["open", "use", "ttl", "pin", "unpin", "run", "stop", "close", "wait"]),
        st.sampled_from([0.5, 1.0, 3.0, 20.0, None]),
    ),
    max_size=60,
)


@given(LIVES)
def test_expiry_finds_what_a_look_at_every_session_would(lives: list[tuple[int, str, float | None]]) -> None:
    """Against the plain way: ask each session each time."""
    expiry, now = Expiry(), 1000.0
    sessions: dict[int, Session] = {}
    for which, what, seconds in lives:
        session = sessions.get(which)
        if what == "wait":
            now += seconds or 2.0
        elif what == "open" and session is None:
            session = sessions[which] = Session(str(which), "", "m", 9, [Sequence()], now, now, seconds)
        elif session is None:
            continue
        elif what == "close":
            expiry.forget(sessions.pop(which))
            continue
        elif what == "ttl":
            session.ttl_seconds, session.last_used_at = seconds, now
        elif what in ("pin", "unpin"):
            session.pinned, session.last_used_at = what == "pin", now
        elif what in ("run", "stop"):
            session.state = SessionState.RUNNING if what == "run" else SessionState.IDLE
            session.last_used_at = now
        elif what == "use":
            session.last_used_at = now
        if session is not None and what != "wait":
            expiry.watch(session)
        ends = {
            number
            for number, other in sessions.items()
            if other.state is SessionState.IDLE and other.expires_at is not None and other.expires_at <= now
        }
        assert {int(other.id) for other in expiry.due(now)} == ends
        for number in ends:
            del sessions[number]
        ahead = [other.expires_at for other in sessions.values() if other.expires_at and other.expires_at > now]
        assert not ahead or (expiry.next is not None and expiry.next <= min(ahead))
