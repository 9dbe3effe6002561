"""What happened to sessions, told to whoever watches: a bounded ring of events for each tenant.

    the engine, under its lock    emit > ring > tell (once, to each reader that has read all)
    a reader, on any thread       read > events from where it stands, a Gap where the ring has lost some

The ring is the only buffer, so a slow reader costs nothing and holds up nobody: it finds a gap when it comes back.
A tenant that has neither sessions nor readers is forgotten after a while, its ring with it.
"""

from __future__ import annotations

import re
import secrets
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from engine.errors import InvalidInput
from engine.session import Session

EventKind = Literal[
    "created", "committed", "forked", "truncated", "imported", "exported", "evicted", "expired", "deleted"
]

_ID = re.compile(r"([0-9a-f]{8})-(\d{1,18})", re.ASCII)


class SessionEvent(NamedTuple):
    """`version` and `valid_length` are the session's after it happened; `at` is in seconds since the epoch."""

    id: str
    kind: EventKind
    at: float
    session_id: str
    model: str
    version: int
    valid_length: array[int]
    parent: str | None


_Event: TypeAlias = "tuple[EventKind, float, str, str, int, array[int], str | None]"  # without its id, which few read


@dataclass(frozen=True, slots=True)
class Gap:
    """`lost` events are not told any more; None: nobody can say how many. `id` resumes after it."""

    id: str
    lost: int | None


def open_sessions(counts: Mapping[EventKind, int]) -> int:
    """How many sessions are there, by the events there have been."""
    return sum(births * counts[kind] for kind, births in _BIRTHS.items())


_BIRTHS: dict[EventKind, int] = {"created": 1, "forked": 1, "deleted": -1, "expired": -1, "evicted": -1}


class EventLog:
    """`size` events of each tenant are kept, and those of one that has left for `kept_seconds`. `clock` gives seconds
    since the epoch."""

    def __init__(self, size: int, clock: Callable[[], float], kept_seconds: float = 3600.0) -> None:
        self._size = size
        self._clock = clock
        self._kept_seconds = kept_seconds
        self._lock = threading.Lock()
        self._rings: dict[str, _Ring] = {}
        self._counts: Counter[tuple[str, EventKind]] = Counter()  # by model
        self._left: dict[str, float] = {}  # tenants with neither sessions nor readers, and since when; oldest first

    @property
    def tenants(self) -> int:
        """How many have a ring."""
        return len(self._rings)

    def counts(self, model: str) -> dict[EventKind, int]:
        """How many of each kind there have been of the model's sessions, also those that no ring has any more."""
        with self._lock:
            return {kind: self._counts[model, kind] for kind in get_args(EventKind)}

    def emit(self, kind: EventKind, session: Session) -> None:
        lengths, now = array("i", session.valid_length), self._clock()
        with self._lock:
            self._counts[session.model, kind] += 1
            ring = self._ring(session.tenant)
            ring.add((kind, now, session.id, session.model, session.version, lengths, session.parent))
            if births := _BIRTHS.get(kind):
                ring.sessions += births
                self._note(session.tenant, ring, now)
            self._forget(now)

    def watch(self, tenant: str, after: str | None, tell: Callable[[], object]) -> Watch:
        """A reader's place: after the event of that id, else after the last one there is.

        `tell` is called when there is more, once after each `read` that gave nothing; on the engine's thread, so it
        must be quick. Raises InvalidInput for an id that no stream gave.
        """
        with self._lock:
            ring = self._rings.get(tenant) or _Ring(self._size)
            at = ring.end if after is None else ring.place(after)
            self._rings[tenant] = ring
            self._read_by(tenant, ring, 1)
        return Watch(self._lock, ring, at, tell, lambda: self._read_by(tenant, ring, -1))

    def _read_by(self, tenant: str, ring: _Ring, more: int) -> None:
        """So many readers more; under the lock."""
        ring.readers += more
        self._note(tenant, ring, self._clock())

    def _note(self, tenant: str, ring: _Ring, now: float) -> None:
        """Whether the tenant has left, as of now."""
        self._left.pop(tenant, None)
        if ring.sessions <= 0 and not ring.readers:
            self._left[tenant] = now

    def _forget(self, now: float) -> None:
        """Those who left long ago."""
        while self._left:
            tenant, since = next(iter(self._left.items()))
            if now < since + self._kept_seconds:
                return
            del self._left[tenant], self._rings[tenant]

    def _ring(self, tenant: str) -> _Ring:
        ring = self._rings.get(tenant)
        if ring is None:
            ring = self._rings[tenant] = _Ring(self._size)
        return ring


class Watch:
    """Not to be shared between threads; `close` it at the end."""

    def __init__(
        self,
        lock: threading.Lock,
        ring: _Ring,
        at: int | None,
        tell: Callable[[], object],
        closed: Callable[[], object],
    ) -> None:
        self._lock = lock
        self._ring = ring
        self._at = at  # None: not of this ring
        self._tell = tell
        self._closed = closed  # called once, under the lock

    def read(self, limit: int) -> list[SessionEvent | Gap]:
        """What comes next, `limit` events at most; never waits."""
        with self._lock:
            ring = self._ring
            told: list[SessionEvent | Gap] = []
            if self._at is None or self._at < ring.start:
                told.append(Gap(ring.id(ring.start - 1), None if self._at is None else ring.start - self._at))
                self._at = ring.start
            events = ring.read(self._at, limit)
            self._at += len(events)
            if not told and not events:
                ring.waiting.add(self._tell)
            return [*told, *events]

    def close(self) -> None:
        with self._lock:
            self._ring.waiting.discard(self._tell)
            self._closed()


class _Ring:
    """Events [start, end) by number; an id is the ring's own name and a number, so that one of another life of the
    service is recognised."""

    def __init__(self, size: int) -> None:
        self.end = 0
        self.waiting: set[Callable[[], object]] = set()
        self.sessions = 0  # that the tenant has
        self.readers = 0
        self._name = secrets.token_hex(4)
        self._size = size
        self._events: list[_Event] = []

    @property
    def start(self) -> int:
        return self.end - len(self._events)

    def id(self, number: int) -> str:
        return f"{self._name}-{number + 1}"  # from 1, so that 0 is before all

    def place(self, event_id: str) -> int | None:
        match = _ID.fullmatch(event_id)
        if match is None:
            raise InvalidInput("Last-Event-ID", f"is not an id of an event, got {event_id[:80]!r}")
        if match[1] != self._name:
            return None
        if int(match[2]) > self.end:
            raise InvalidInput("Last-Event-ID", f"is of no event yet; the last one is {self.id(self.end - 1)}")
        return int(match[2])

    def add(self, event: _Event) -> None:
        if len(self._events) < self._size:
            self._events.append(event)
        else:
            self._events[self.end % self._size] = event
        self.end += 1
        waiting, self.waiting = self.waiting, set()
        for tell in waiting:
            tell()

    def read(self, at: int, limit: int) -> list[SessionEvent]:
        numbers = range(at, min(self.end, at + limit))
        return [SessionEvent(self.id(number), *self._events[number % self._size]) for number in numbers]
