"""Which sessions are listed, in what order, and what a page costs."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.session import Sequence
from engine.store import SessionStore
from tests.fakes import ATTENTION, DECODER, FakeClock, FakeRunner


@pytest.fixture
def engine() -> Engine:
    engine = Engine([FakeRunner(DECODER), FakeRunner(ATTENTION)], EngineConfig(), FakeClock())
    for name, model, labels in (
        ("a", "decoder", {"team": "red"}),
        ("b", "decoder", {}),
        ("c", "attention", {"team": "blue", "shift": "night"}),
    ):
        engine.create_session(model, session_id=name, labels=labels)
    engine.create_session("decoder", session_id="d", tenant="other")
    return engine


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, "abc"),
        ({"model": "decoder"}, "ab"),
        ({"model": None, "state": None, "after": None, "limit": None}, "abc"),
        ({"labels": [("team", None)]}, "ac"),
        ({"labels": [("team", "red")]}, "a"),
        ({"labels": [("team", "red"), ("team", "blue")]}, ""),
        ({"labels": [("team", None), ("shift", "night")]}, "c"),
        ({"state": "idle"}, "abc"),
        ({"state": "running"}, ""),
        ({"limit": 2}, "ab"),
        ({"limit": 2, "model": "attention"}, "c"),
    ],
)
def test_what_is_wanted(engine: Engine, wanted: dict[str, Any], found: str) -> None:
    assert [info.id for info in engine.sessions(**wanted)] == list(found)


def test_a_page_follows_the_one_before(engine: Engine) -> None:
    first = engine.sessions(limit=2)
    engine.delete_session(first[-1].id)
    assert [info.id for info in engine.sessions(after=first[-1].created_at)] == ["c"]


@given(st.lists(st.sampled_from([-3600.0, -1.0, 0.0, 0.0, 1e-9, 5.0]), max_size=30))
def test_creation_is_an_order_whatever_the_clock_does(steps: list[float]) -> None:
    clock = FakeClock(1.8e9)
    store = SessionStore(1000, 10, clock)
    created = []
    for step in steps:
        clock.now += step
        created.append(store.open("", "m", 9, [Sequence()]).created_at)
    assert created == sorted(set(created))
    for at, after in enumerate(created):
        assert [session.created_at for session in store.select("", {"after": after})] == created[at + 1 :]
