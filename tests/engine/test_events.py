"""What an engine tells of its sessions, and what a bounded ring makes of it."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Append, ExportPast, Generate, ImportPast, Operation, Truncate
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import InvalidInput, ModelFailed
from engine.events import EventLog, Gap, SessionEvent, Watch
from engine.session import Sequence, Session
from tests.fakes import DECODER, FakeClock, FakeRunner

Told = list[SessionEvent | Gap]


class House:
    def __init__(self, **config: Any) -> None:
        self.runner = FakeRunner(DECODER)
        self.clock = FakeClock()
        self.engine = Engine([self.runner], EngineConfig(**config), self.clock)
        self.watch = self.engine.events.watch("", None, list)

    def finish(self, operation: Operation) -> None:
        self.engine.submit(operation)
        while self.engine.run_once():
            self.engine.check()
        operation.future.result(0)

    def append(self, session: str, *tokens: int, keep: bool = True) -> None:
        self.finish(Append(session, {"token_ids": np.array([tokens])}, keep=keep))

    def told(self) -> list[tuple[str, str, int, list[int]]]:
        events = self.watch.read(100)
        assert all(isinstance(event, SessionEvent) for event in events)
        return [
            (e.kind, e.session_id, e.version, e.valid_length.tolist()) for e in events if isinstance(e, SessionEvent)
        ]


@pytest.fixture
def house() -> House:
    return House()


def log(size: int = 4) -> tuple[EventLog, Callable[..., None]]:
    """And a way to add an event to it, told apart by its version."""
    kept = EventLog(size, FakeClock())

    def add(version: int, tenant: str = "") -> None:
        session = Session("s", tenant, "m", 9, [Sequence()], 0.0, 0.0, version=version)
        kept.emit("committed", session)

    return kept, add


def versions(events: Told) -> list[int | str | None]:
    """A gap is how many were lost, as text."""
    return [event.version if isinstance(event, SessionEvent) else f"{event.lost}" for event in events]


def test_a_life_is_told_in_order(house: House) -> None:
    engine = house.engine
    engine.create_session("decoder", session_id="a")
    house.append("a", 1, 2, 3)
    house.clock.now += 1
    house.append("a", 4)
    child = engine.fork("a", at=2)[0].id
    house.finish(Truncate("a", 1))
    house.finish(Generate("a", 2))
    export = ExportPast("a")
    house.finish(export)
    engine.create_session("decoder", session_id="b", ttl_seconds=5)
    house.finish(ImportPast("b", export.future.result(0).past))
    engine.delete_session("a")
    house.clock.now += 6
    engine.run_once()
    assert house.told() == [
        ("created", "a", 0, [0]),
        ("committed", "a", 1, [3]),
        ("committed", "a", 2, [4]),
        ("forked", child, 0, [2]),
        ("truncated", "a", 3, [1]),
        ("committed", "a", 4, [2]),
        ("committed", "a", 5, [3]),
        ("exported", "a", 5, [3]),
        ("created", "b", 0, [0]),
        ("imported", "b", 1, [3]),
        ("deleted", "a", 5, [3]),
        ("expired", "b", 1, [3]),
    ]


def test_a_fork_names_its_parent_and_all_have_a_time(house: House) -> None:
    house.engine.create_session("decoder", session_id="a")
    house.clock.now += 2
    child = house.engine.fork("a")[0]
    created, forked = house.watch.read(9)
    assert isinstance(created, SessionEvent)
    assert isinstance(forked, SessionEvent)
    assert (created.parent, forked.parent, forked.session_id) == (None, "a", child.id)
    assert (created.at, forked.at, created.model) == (1000.0, 1002.0, "decoder")


def test_what_changes_nothing_is_not_told(house: House) -> None:
    house.engine.create_session("decoder", session_id="a")
    house.append("a", 1)
    house.told()
    house.append("a", 2, keep=False)
    house.runner.poison = 66
    with pytest.raises(ModelFailed):
        house.append("a", 66)
    with pytest.raises(InvalidInput):
        house.append("a", 1000)
    house.engine.session("a")
    assert house.told() == []


def test_tenants_see_their_own_alone(house: House) -> None:
    other = house.engine.events.watch("b", None, list)
    house.engine.create_session("decoder", session_id="a")
    house.engine.create_session("decoder", session_id="a", tenant="b")
    assert (len(house.watch.read(9)), len(other.read(9))) == (1, 1)


def test_a_tenant_that_has_left_is_forgotten_after_a_while() -> None:
    house = House(tombstone_seconds=60)
    events = house.engine.events
    for number in range(50):
        tenant = f"t{number}"
        session = house.engine.create_session("decoder", tenant=tenant).id
        house.engine.fork(session, tenant=tenant)
        for info in house.engine.sessions(tenant) if number else []:
            house.engine.delete_session(info.id, tenant)
    reader = events.watch("t7", None, list)
    events.watch("nobody", None, list).close()
    assert events.tenants == 52, "the house's own, and they"
    house.clock.now += 59
    house.engine.create_session("decoder")
    last = events.watch("t8", None, list)
    last.close()
    assert events.tenants == 52
    house.clock.now += 2
    house.engine.create_session("decoder")
    assert events.tenants == 4, "who has sessions or reads, or left a moment ago"
    reader.close()
    house.clock.now += 61
    house.engine.create_session("decoder")
    assert events.tenants == 2
    house.engine.create_session("decoder", tenant="t7")
    assert len(events.watch("t7", None, list).read(9)) == 0


def test_who_comes_back_too_late_finds_a_gap() -> None:
    house = House(tombstone_seconds=60)
    reader = house.engine.events.watch("b", None, list)
    house.engine.delete_session(house.engine.create_session("decoder", tenant="b").id, "b")
    last = reader.read(9)[-1].id
    reader.close()
    house.clock.now += 61
    house.engine.create_session("decoder")
    house.engine.create_session("decoder", tenant="b")
    assert versions(house.engine.events.watch("b", last, list).read(9)) == ["None", 0]


def test_the_ring_is_bounded_and_a_gap_is_counted() -> None:
    kept, add = log(4)
    watch = kept.watch("", None, list)
    for version in range(3):
        add(version)
    assert versions(watch.read(2)) == [0, 1]
    for version in range(3, 9):
        add(version)
    assert versions(watch.read(9)) == ["3", 5, 6, 7, 8]
    assert watch.read(9) == []


def test_an_id_resumes_after_its_event() -> None:
    kept, add = log(4)
    first = kept.watch("", None, list)
    for version in range(3):
        add(version)
    events = first.read(9)
    for at, event in enumerate(events):
        assert versions(kept.watch("", event.id, list).read(9)) == list(range(at + 1, 3))
    for version in range(3, 7):
        add(version)
    lost = kept.watch("", events[0].id, list).read(9)
    assert versions(lost) == ["2", 3, 4, 5, 6]
    assert versions(kept.watch("", lost[0].id, list).read(9)) == [3, 4, 5, 6], "a gap's own id resumes behind it"


def test_an_id_of_another_life_is_a_gap_of_unknown_length() -> None:
    (before, add_before), (kept, add) = log(), log()
    add_before(0)
    old = before.watch("", None, list)
    add_before(1)
    add(7)
    assert versions(kept.watch("", old.read(1)[0].id, list).read(9)) == ["None", 7]


@pytest.mark.parametrize(
    "wrong", ["", "5", "-1", "zzzzzzzz-1", "0123abcd", "0123abcd--1", "0123abcd-1.5", "0123abcd-١"]
)
def test_what_is_no_id(wrong: str) -> None:
    with pytest.raises(InvalidInput, match="Last-Event-ID"):
        log()[0].watch("", wrong, list)


def test_an_event_that_has_not_been_is_no_id_either() -> None:
    kept, add = log()
    watch = kept.watch("", None, list)
    add(0)
    name = watch.read(1)[0].id.partition("-")[0]
    for number in (2, 2**31, 2**53):
        with pytest.raises(InvalidInput, match=f"the last one is {name}-1"):
            kept.watch("", f"{name}-{number}", list)


def test_a_reader_is_told_once_after_it_has_read_all() -> None:
    kept, add = log()
    told: list[int] = []
    watch = kept.watch("", None, lambda: told.append(1))
    add(0)
    assert told == [], "it has not read yet, and will find it"
    assert len(watch.read(9)) == 1
    assert watch.read(9) == []
    for version in range(1, 4):
        add(version)
    assert told == [1]
    watch.read(9)
    watch.read(9)
    watch.close()
    add(4)
    assert told == [1]


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=40))
def test_nothing_is_told_twice_or_out_of_order(size: int, turns: list[tuple[bool, int]]) -> None:
    """Against a plain list: every event is told, or counted in a gap."""
    kept, add = log(size)
    watch: Watch = kept.watch("", None, list)
    added = expected = 0
    for adds, count in turns:
        if adds:
            for _ in range(count):
                add(added)
                added += 1
            continue
        for item in watch.read(count):
            if isinstance(item, Gap):
                assert item.lost is not None
                expected += item.lost
            else:
                assert item.version == expected
                expected += 1
        assert expected <= added
    while events := watch.read(3):
        expected += sum(event.lost or 0 if isinstance(event, Gap) else 1 for event in events)
    assert expected == added


def test_readers_and_writer_on_threads_of_their_own() -> None:
    kept, add = log(64)
    seen: list[int] = []
    woken = threading.Event()
    watch = kept.watch("", None, woken.set)

    def read() -> None:
        while sum(seen) < 5000:
            woken.clear()
            events = watch.read(16)
            seen.extend(event.lost or 0 if isinstance(event, Gap) else 1 for event in events)
            if not events:
                woken.wait(10)

    reader = threading.Thread(target=read)
    reader.start()
    for version in range(5000):
        add(version)
    reader.join(20)
    assert sum(seen) == 5000
