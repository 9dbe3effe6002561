"""When sessions end by themselves. A use puts a session's end off and costs nothing here: its entry is looked at again
when the time that it was noted for has come."""

import heapq
import itertools

from engine.session import Session, SessionState


class Expiry:
    def __init__(self) -> None:
        self._noted: dict[Session, float] = {}
        self._heap: list[tuple[float, int, Session]] = []  # and entries that are not the noted ones any more
        self._running: set[Session] = set()  # when their time came: looked at each time, until they are idle
        self._numbers = itertools.count()

    @property
    def next(self) -> float | None:
        """When to ask for `due` again, at the latest, or None. Whatever ran and is idle is a reason to ask, too."""
        return self._heap[0][0] if self._heap else None

    def watch(self, session: Session) -> None:
        """To be told of whatever may bring the session's end nearer."""
        at = session.expires_at
        if at is not None and at < self._noted.get(session, float("inf")):
            self._note(session, at)

    def forget(self, session: Session) -> None:
        self._noted.pop(session, None)
        self._running.discard(session)

    def due(self, now: float) -> list[Session]:
        """Idle sessions whose end has come. They are the caller's to close; nothing here knows them any more."""
        looked, self._running = list(self._running), set()
        while self._heap and self._heap[0][0] <= now:
            at, _, session = heapq.heappop(self._heap)
            if self._noted.get(session) != at:
                continue
            del self._noted[session]
            looked.append(session)
        found = []
        for session in looked:
            ends = session.expires_at
            if ends is None or ends > now:
                self.watch(session)
            elif session.state is SessionState.RUNNING:
                self._running.add(session)
            else:
                found.append(session)
        return found

    def _note(self, session: Session, at: float) -> None:
        self._noted[session] = at
        heapq.heappush(self._heap, (at, next(self._numbers), session))
        if len(self._heap) > 2 * len(self._noted) + 64:
            self._heap = [(at, next(self._numbers), session) for session, at in self._noted.items()]
            heapq.heapify(self._heap)
