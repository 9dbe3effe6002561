"""What is remembered of requests, against a plain model of it: a list of all that was ever done."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.batch import AppendResult, Effort, Once
from engine.errors import KeyReused, ReplyDropped
from engine.replay import Replays, weigh
from engine.session import Session
from engine.stats import Receipt, SessionInfo

EFFORT = Effort([1], [0], [0])


def session(name: str = "a") -> Session:
    return Session(name, "tenant", "model", 100, [], created_at=0, last_used_at=0)


def replays(keys: int = 3, session_bytes: int = 10_000, total_bytes: int = 15_000, receipts: int = 2) -> Replays:
    return Replays(keys, session_bytes, total_bytes, receipts)


def result(size: int, version: int = 1) -> AppendResult:
    return AppendResult({"logits": np.zeros(size, np.uint8)}, [0], [1], version, 0.0, 0.0, EFFORT)


OVERHEAD = weigh(result(0))


def do(replays: Replays, session: Session, once: Once | None, result: object, changes: bool = True) -> None:
    before = session.version
    session.version += changes
    replays.remember(session, once, result, before)
    replays.check()


def info(name: str) -> SessionInfo:
    return SessionInfo(name, "tenant", "m", "k", "idle", [0], 1, 0, 0, 0, 0, None, {}, None, False, 0.0, 0.0, None)


class Uncopied(np.ndarray[Any, Any]):
    def copy(self, *args: Any, **kwargs: Any) -> Any:
        raise MemoryError


def test_a_result_that_there_is_no_memory_for_is_known_and_cannot_be_told() -> None:
    known, own = replays(), session()
    outputs: dict[str, Any] = {"logits": np.zeros(18, np.uint8)[:9].view(Uncopied)}
    do(known, own, Once(b"body", "k"), AppendResult(outputs, [0], [1], 1, 0.0, 0.0, EFFORT))
    with pytest.raises(ReplyDropped):
        known.find(own, Once(b"body", "k"))


def test_a_key_gives_its_result_again_and_only_to_its_own_request() -> None:
    known, own = replays(), session()
    first = Once(b"body", "k")
    assert known.find(own, first) is None
    do(known, own, first, "reply")
    again = Once(b"body", "k")
    assert (known.find(own, again), again.replayed, first.replayed) == ("reply", True, False)
    assert known.find(own, Once(b"body", "other")) is None
    assert known.find(session("b"), Once(b"body", "k")) is None
    with pytest.raises(KeyReused):
        known.find(own, Once(b"another", "k"))


def test_without_a_key_the_last_change_is_known_by_the_version_before_it() -> None:
    known, own = replays(), session()
    do(known, own, Once(b"one"), "first")
    do(known, own, Once(b"two", "k"), "second")
    assert known.find(own, Once(b"two"), 1) == "second"
    for digest, expected in ((b"one", 0), (b"two", 0), (b"two", 2), (b"two", None), (b"one", 1)):
        assert known.find(own, Once(digest), expected) is None
    do(known, own, Once(b"ask", "q"), "a peek", changes=False)
    assert known.find(own, Once(b"two"), 1) == "second", "what changes nothing leaves the last change the last"
    do(known, own, None, "unnamed")
    assert known.find(own, Once(b"two"), 1) is None
    assert known.find(own, Once(b"two", "k")) == "second"


def test_a_version_that_moved_otherwise_is_no_retry() -> None:
    known, own = replays(), session()
    do(known, own, Once(b"one"), "first")
    own.version += 1
    assert known.find(own, Once(b"one"), 0) is None


def test_the_last_keys_are_known_and_no_more() -> None:
    known, own = replays(keys=2), session()
    for key in "abc":
        do(known, own, Once(b"body", key), key)
    assert [known.find(own, Once(b"body", key)) for key in "abc"] == [None, "b", "c"]


def test_a_reply_that_is_too_large_is_told_of_and_never_done_again() -> None:
    known, own = replays(session_bytes=1000), session()
    do(known, own, Once(b"body", "k"), result(2000))
    own.version = 5
    once = Once(b"body", "k")
    with pytest.raises(ReplyDropped) as dropped:
        known.find(own, once)
    assert (dropped.value.made, dropped.value.version, once.replayed) == (1, 5, False)
    own.version = 1
    with pytest.raises(ReplyDropped):
        known.find(own, Once(b"body"), 0)
    assert known.size == 0


def test_the_oldest_replies_give_way_in_a_session_and_in_all() -> None:
    large = 4000 - OVERHEAD
    known, one, two = replays(keys=9, session_bytes=8000, total_bytes=12_000), session("1"), session("2")
    for key in "abc":
        do(known, one, Once(b"body", key), result(large))
    assert known.size == 8000
    with pytest.raises(ReplyDropped):
        known.find(one, Once(b"body", "a"))
    assert known.find(one, Once(b"body", "b")) is not None
    for key in "de":
        do(known, two, Once(b"body", key), result(large))
    with pytest.raises(ReplyDropped):
        known.find(one, Once(b"body", "b"))
    assert known.find(one, Once(b"body", "c")) is not None
    known.forget(one)
    known.check()
    assert known.size == 8000
    assert known.find(one, Once(b"body", "c")) is None
    known.forget(two)
    assert repr(known) == "<Replays 0 replies of 0 sessions, 0 bytes>"


def test_a_reply_has_arrays_of_its_own() -> None:
    batch = np.arange(1000.0)
    known, own = replays(), session()
    do(
        known,
        own,
        Once(b"body", "k"),
        AppendResult({"logits": batch[3:5], "text": ["a"]}, [0], [1], 1, 0.0, 0.0, EFFORT),
    )
    batch[:] = 0
    kept = known.find(own, Once(b"body", "k"))
    assert kept.outputs["logits"].tolist() == [3, 4]
    assert kept.outputs["logits"].base is None


def test_what_waits_with_the_key_holds_it() -> None:
    @dataclass
    class Waiting:
        once: Once | None
        future: Future[Any] = field(default_factory=Future)

    known, own = replays(), session()
    own.waiting.append(Waiting(None))
    own.waiting.append(Waiting(Once(b"body", "k")))
    assert known.find(own, Once(b"body", "k")) is None
    assert known.find(own, Once(b"another")) is None
    with pytest.raises(KeyReused):
        known.find(own, Once(b"another", "k"))
    own.waiting[1].future.cancel()
    assert known.find(own, Once(b"another", "k")) is None


def test_creations_and_receipts() -> None:
    known, own = replays(receipts=2), session()
    created, receipt = info("a"), Receipt("a", 1, 2, 3, 4)
    once = Once(b"create", "k")
    known.remember_created(own, once, created)
    again = Once(b"create", "k")
    assert (known.find_created("tenant", again), again.replayed) == (created, True)
    assert known.find_created("another", Once(b"create", "k")) is None
    assert known.find_created("tenant", Once(b"create")) is None
    with pytest.raises(KeyReused):
        known.find_created("tenant", Once(b"another", "k"))
    known.forget(own)
    assert known.find_created("tenant", Once(b"create", "k")) is None
    known.remember_deleted(own, Once(b"delete", "d"), receipt)
    assert known.find_deleted("tenant", "a", Once(b"delete", "d")) == receipt
    for tenant, digest, key in (("another", b"delete", "d"), ("tenant", b"other", "d"), ("tenant", b"delete", None)):
        assert known.find_deleted(tenant, "a", Once(digest, key)) is None
    for name in "bc":
        known.remember_deleted(session(name), Once(b"delete", "d"), receipt)
    assert known.find_deleted("tenant", "a", Once(b"delete", "d")) is None, "receipts are bounded"
    assert known.find_deleted("tenant", "c", Once(b"delete", "d")) == receipt


@given(st.integers(0, 500), st.lists(st.integers()), st.text(max_size=50))
def test_weights(size: int, numbers: list[int], text: str) -> None:
    assert weigh(np.zeros(size, np.float32)) >= 4 * size
    assert weigh({"a": numbers, "b": [text, text]}) >= 8 * len(numbers) + 2 * len(text)
    assert weigh([(1, 0.5)] * len(numbers)) >= 16 * len(numbers)


KEYS = st.sampled_from([None, "a", "b", "c", "d", "e"])
DIGESTS = st.sampled_from([b"one", b"two"])


@dataclass
class Done:
    """One change or peek, as the model has it."""

    once: Once
    before: int | None
    version: int
    number: int
    fits: bool


class Memory(RuleBasedStateMachine):
    """`done` are a session's, in order; a reply is an array that holds the request's number."""

    MOST, SESSION_BYTES, TOTAL_BYTES = 3, 3000, 5000

    def __init__(self) -> None:
        super().__init__()
        self.known = Replays(self.MOST, self.SESSION_BYTES, self.TOTAL_BYTES, 2)
        self.sessions = [session("0"), session("1")]
        self.done: list[list[Done]] = [[], []]
        self.count = 0

    def by_key(self, at: int) -> dict[str, Done]:
        keyed = [done for done in self.done[at] if done.once.key is not None]
        return {str(done.once.key): done for done in keyed[-self.MOST :]}

    def last(self, at: int) -> Done | None:
        changes = [done for done in self.done[at] if done.before is not None]
        return changes[-1] if changes else None

    @rule(
        at=st.integers(0, 1),
        key=KEYS,
        digest=DIGESTS,
        back=st.integers(0, 2),
        size=st.integers(1, 2500),
        changes=st.booleans(),
    )
    def request(self, at: int, key: str | None, digest: bytes, back: int, size: int, changes: bool) -> None:
        """Sent with If-Match, `back` versions behind."""
        own, once = self.sessions[at], Once(digest, key)
        expected = own.version - back
        told = self.by_key(at).get(key) if key is not None else self.last(at)
        if key is None and told is not None and (told.once.digest, told.before) != (digest, expected):
            told = None
        if told is not None and told.once.digest != digest:
            with pytest.raises(KeyReused):
                self.known.find(own, once, expected)
            return
        found, made = None, None
        try:
            found = self.known.find(own, once, expected)
        except ReplyDropped as dropped:
            made = dropped.made
        if made is not None:
            assert told is not None
            assert made == told.version
            return
        assert once.replayed == (found is not None)
        if found is not None:
            assert told is not None
            assert found.outputs["n"][0] == told.number
            return
        assert told is None, "what was done is never done again"
        self.count += 1
        before = own.version
        own.version += changes
        outputs = {"n": np.full(size // 4 + 1, self.count, np.int32)}
        reply = AppendResult(outputs, [0], [0], own.version, 0.0, 0.0, EFFORT)
        self.known.remember(own, once, reply, before)
        fits = weigh(reply) <= self.SESSION_BYTES
        self.done[at].append(Done(once, before if changes else None, own.version, self.count, fits))

    @rule(at=st.integers(0, 1))
    def close(self, at: int) -> None:
        self.known.forget(self.sessions[at])
        self.sessions[at], self.done[at] = session(str(at)), []

    @precondition(lambda self: any(self.done))
    @rule()
    def the_newest_reply_that_fits_is_always_kept(self) -> None:
        newest = max((done for own in self.done for done in own), key=lambda done: done.number)
        if newest.number != self.count:
            return  # a newer one went with its session, and may have pushed this one out before
        at = next(at for at, own in enumerate(self.done) if newest in own)
        if newest.once.key is not None and newest.fits:
            found = self.known.find(self.sessions[at], Once(newest.once.digest, newest.once.key))
            assert found.outputs["n"][0] == newest.number

    @invariant()
    def it_adds_up(self) -> None:
        self.known.check()


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
