"""Who is there: sessions by (tenant, id), tombstones of those that were, time to live. No blocks, no tensors."""

import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator

from engine.errors import InvalidInput, QueueFull, SessionExists, SessionGone, SessionNotFound
from engine.session import Sequence, Session, SessionState

ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class SessionStore:
    def __init__(self, max_sessions: int, tombstones: int, clock: Callable[[], float]) -> None:
        self._sessions: dict[tuple[str, str], Session] = {}
        self._tombstones: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._max_sessions = max_sessions
        self._max_tombstones = tombstones
        self._clock = clock

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def open(
        self,
        tenant: str,
        model: str,
        max_length: int,
        sequences: list[Sequence],
        *,
        session_id: str | None = None,
        ttl_seconds: float | None = None,
        labels: dict[str, str] | None = None,
        parent: str | None = None,
    ) -> Session:
        """A new IDLE session. Raises InvalidInput, SessionExists, QueueFull (too many sessions)."""
        if len(self._sessions) >= self._max_sessions:
            raise QueueFull(f"there are {self._max_sessions} sessions already; delete one")
        if session_id is None:
            session_id = secrets.token_urlsafe(18)
        elif not ID_PATTERN.fullmatch(session_id):
            raise InvalidInput("id", "must match [A-Za-z0-9_-]{1,64}")
        key = (tenant, session_id)
        if key in self._sessions:
            raise SessionExists(session_id)
        self._tombstones.pop(key, None)
        now = self._clock()
        session = Session(
            id=session_id,
            tenant=tenant,
            model=model,
            max_length=max_length,
            sequences=sequences,
            created_at=now,
            last_used_at=now,
            ttl_seconds=ttl_seconds,
            labels=dict(labels or {}),
            parent=parent,
        )
        self._sessions[key] = session
        return session

    def find(self, tenant: str, session_id: str) -> Session:
        """Raises SessionGone for one that was there (an expired one too, before it is swept), else SessionNotFound."""
        key = (tenant, session_id)
        session = self._sessions.get(key)
        if session is None:
            reason = self._tombstones.get(key)
            raise SessionNotFound if reason is None else SessionGone(reason)
        if self._is_expired(session):
            raise SessionGone("expired")
        return session

    def close(self, session: Session, reason: str) -> None:
        """Takes it out and leaves a tombstone; its blocks are the caller's to free."""
        key = (session.tenant, session.id)
        del self._sessions[key]
        session.state = SessionState.CLOSED
        session.closed_reason = reason
        self._tombstones[key] = reason
        while len(self._tombstones) > self._max_tombstones:
            self._tombstones.popitem(last=False)

    def expired(self) -> list[Session]:
        """Sessions past their time to live. A running one is in use and does not expire."""
        return [session for session in self._sessions.values() if self._is_expired(session)]

    def touch(self, session: Session) -> None:
        session.last_used_at = self._clock()

    def _is_expired(self, session: Session) -> bool:
        expires_at = session.expires_at
        return expires_at is not None and session.state is SessionState.IDLE and self._clock() >= expires_at
