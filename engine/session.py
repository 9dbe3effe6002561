"""A session: a client's handle on growing sequences.

    state      means                                        moved by
    IDLE       no append runs; blocks are held, not pinned  create, commit, roll back
    RUNNING    its first waiting append is in the engine    engine: start of an append
    CLOSED     gone, `closed_reason` says why               delete, expiry, eviction; never leaves this state

A sequence's committed positions are [0, length). Its block table covers at least them; while an append runs it covers
the reserved positions too, and rolling back cuts it to the committed ones again.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypedDict


class SessionState(Enum):
    IDLE = "idle"
    RUNNING = "running"
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class Sequence:
    """One row of a session.

    `history`: the ids appended at [0, length), for models that keep them. `tail`: what the model's head needs to give
    the outputs of position length - 1 again; opaque here, dropped when the length shrinks.
    """

    length: int = 0
    block_table: array[int] = field(default_factory=lambda: array("i"))
    history: array[int] = field(default_factory=lambda: array("q"))
    tail: Any = None


class SessionChanges(TypedDict, total=False):
    """What may be changed of a session, as a merge patch (RFC 7396): what is absent stays. `ttl_seconds` None: for
    ever. A label of None is taken away, labels of None are all taken away."""

    ttl_seconds: float | None
    pinned: bool
    labels: Mapping[str, str | None] | None


class SessionFilter(TypedDict, total=False):
    """Which sessions; what is absent or None is no condition. `labels`: all must hold, a value of None is any value.
    `after`: created later than that. `limit`: so many at most."""

    model: str | None
    state: str | None
    labels: Collection[tuple[str, str | None]]
    after: float | None
    limit: int | None


@dataclass(slots=True, eq=False)
class Session:
    id: str
    tenant: str
    model: str
    max_length: int
    sequences: list[Sequence]
    created_at: float
    last_used_at: float
    ttl_seconds: float | None = None
    pinned: bool = False  # never expires, is never evicted
    labels: dict[str, str] = field(default_factory=dict)
    parent: str | None = None
    version: int = 0
    state: SessionState = SessionState.IDLE
    closed_reason: str | None = None
    waiting: deque[Any] = field(default_factory=deque)  # operations in arrival order; the first runs when RUNNING

    @property
    def valid_length(self) -> list[int]:
        return [sequence.length for sequence in self.sequences]

    @property
    def expires_at(self) -> float | None:
        return None if self.ttl_seconds is None or self.pinned else self.last_used_at + self.ttl_seconds

    def __repr__(self) -> str:
        lengths = ",".join(str(length) for length in self.valid_length)
        return f"<Session {self.id} {self.state.name} v{self.version} [{lengths}]>"
