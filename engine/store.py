"""Who is there: sessions by tenant and id, tombstones of those that were, time to live. No blocks, no tensors."""

import math
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from itertools import chain, islice

from engine.errors import InvalidInput, QueueFull, SessionExists, SessionGone, SessionNotFound
from engine.expiry import Expiry
from engine.session import Sequence, Session, SessionFilter, SessionState

ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class SessionStore:
    """A tombstone stays for `tombstone_seconds`; of more than `tombstones` the oldest go first."""

    def __init__(
        self, max_sessions: int, tombstones: int, clock: Callable[[], float], tombstone_seconds: float = 3600.0
    ) -> None:
        self._sessions: dict[str, dict[str, Session]] = {}
        self._count = 0
        self._expiry = Expiry()
        self._tombstones: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()  # (reason, until)
        self._max_sessions = max_sessions
        self._max_tombstones = tombstones
        self._tombstone_seconds = tombstone_seconds
        self._clock = clock
        self._newest = 0.0  # no two are created at once, so that this is an order, also if the clock is set back

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Session]:
        return chain.from_iterable(own.values() for own in self._sessions.values())

    def of(self, tenant: str) -> list[Session]:
        """Oldest first."""
        return list(self._sessions.get(tenant, {}).values())

    def newest(self, tenant: str, limit: int) -> Iterator[Session]:
        """The newest first."""
        return islice(reversed(self._sessions.get(tenant, {}).values()), limit)

    def select(self, tenant: str | None, wanted: SessionFilter) -> list[Session]:
        """Oldest first, of one tenant or (None) of all. It looks at the sessions alone, at none after the last that is
        wanted."""
        own: Iterable[Session] = self._sessions.get(tenant, {}).values() if tenant is not None else self._all()
        return list(islice((session for session in own if _matches(session, wanted)), wanted.get("limit")))

    def _all(self) -> Iterator[Session]:
        """Oldest first, as each tenant's are."""
        return merge(*(own.values() for own in self._sessions.values()), key=lambda session: session.created_at)

    def open(
        self,
        tenant: str,
        model: str,
        max_length: int,
        sequences: list[Sequence],
        *,
        session_id: str | None = None,
        ttl_seconds: float | None = None,
        pinned: bool = False,
        labels: dict[str, str] | None = None,
        parent: str | None = None,
    ) -> Session:
        """A new IDLE session. Raises InvalidInput, SessionExists, QueueFull (too many sessions)."""
        if self._count >= self._max_sessions:
            raise QueueFull(f"there are {self._max_sessions} sessions already; delete one")
        if session_id is None:
            session_id = _mint()
        elif not ID_PATTERN.fullmatch(session_id):
            raise InvalidInput("id", "must match [A-Za-z0-9_-]{1,64}")
        if session_id in self._sessions.get(tenant, {}):
            raise SessionExists(session_id)
        self._tombstones.pop((tenant, session_id), None)
        now = self._clock()
        self._newest = max(now, math.nextafter(self._newest, math.inf))
        session = Session(
            id=session_id,
            tenant=tenant,
            model=model,
            max_length=max_length,
            sequences=sequences,
            created_at=self._newest,
            last_used_at=now,
            ttl_seconds=ttl_seconds,
            pinned=pinned,
            labels=dict(labels or {}),
            parent=parent,
        )
        self._sessions.setdefault(tenant, {})[session_id] = session
        self._count += 1
        self._expiry.watch(session)
        return session

    def find(self, tenant: str, session_id: str) -> Session:
        """Raises SessionGone for one that was there (an expired one too, before it is swept), else SessionNotFound."""
        session = self._sessions.get(tenant, {}).get(session_id)
        if session is None:
            reason, until = self._tombstones.get((tenant, session_id), ("", 0.0))
            raise SessionGone(reason) if self._clock() < until else SessionNotFound
        if self._is_expired(session):
            raise SessionGone("expired")
        return session

    def close(self, session: Session, reason: str, *, tombstone: bool = True) -> None:
        """Takes it out and leaves a tombstone, if it is to; its blocks are the caller's to free."""
        own = self._sessions[session.tenant]
        del own[session.id]
        if not own:
            del self._sessions[session.tenant]
        self._count -= 1
        self._expiry.forget(session)
        session.state = SessionState.CLOSED
        session.closed_reason = reason
        if not tombstone:
            return
        now = self._clock()
        self._tombstones[session.tenant, session.id] = (reason, now + self._tombstone_seconds)
        while self._tombstones:
            key, (_, until) = next(iter(self._tombstones.items()))
            if until > now and len(self._tombstones) <= self._max_tombstones:
                break
            del self._tombstones[key]

    def expired(self) -> list[Session]:
        """Sessions past their time to live, which are the caller's to close. A running one is in use and does not
        expire."""
        return self._expiry.due(self._clock())

    @property
    def next_expiry(self) -> float | None:
        """When to ask for `expired` again, or None."""
        return self._expiry.next

    def touch(self, session: Session) -> None:
        """A use: its time to live begins anew, as it is now."""
        session.last_used_at = self._clock()
        self._expiry.watch(session)

    def _is_expired(self, session: Session) -> bool:
        expires_at = session.expires_at
        return expires_at is not None and session.state is SessionState.IDLE and self._clock() >= expires_at


def _mint() -> str:
    """Unguessable, and never begins with a dash, which a command line would take for an option."""
    while (session_id := secrets.token_urlsafe(18)).startswith("-"):
        pass
    return session_id


def _matches(session: Session, wanted: SessionFilter) -> bool:
    after = wanted.get("after")
    if after is not None and session.created_at <= after:
        return False
    if wanted.get("model") not in (None, session.model) or wanted.get("state") not in (None, session.state.value):
        return False
    labels = wanted.get("labels", ())
    return all(key in session.labels and value in (None, session.labels[key]) for key, value in labels)
