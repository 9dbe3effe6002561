"""The engine's books: which sessions there are, what they hold, what was done to them. All of it is answered at once,
under one lock, on the caller's thread, and needs no model: create, read, change, fork, delete. `engine` works on them.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as PySequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, Literal, Unpack

from engine.admission import check_ttl, check_version, merged_labels, row_lengths
from engine.batch import Once, Operation
from engine.blocks import blocks_for
from engine.clock import now
from engine.config import EngineConfig
from engine.errors import EngineStopped, InvalidInput, ModelNotFound, QueueFull, SessionGone, SessionNotFound
from engine.events import EventLog, open_sessions
from engine.prefix import Prefix, longest_prefix
from engine.replay import Replays
from engine.serving import Runner, Served
from engine.session import Sequence, Session, SessionChanges, SessionFilter, SessionState
from engine.specs import ModelSpec
from engine.stats import Capacity, Receipt, SessionInfo
from engine.store import SessionStore
from engine.tally import Figures
from engine.tenants import Tenants

MAX_BATCH_SIZE = 1024
MAX_FORKS = 256
LOOKED_AT = 1024  # of a tenant's sessions, the newest ones, for what a new one may begin with

Closing = Literal["deleted", "expired", "evicted"]


class Books:
    def __init__(self, runners: Iterable[Runner], config: EngineConfig, clock: Callable[[], float] = now) -> None:
        self.config = config
        self._clock = clock
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._has_news = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._wakes_at = math.inf  # when a wait for news ends by itself
        self._has_held = False  # the last turn left something until its hold ends
        self._waiting = 0
        self._store = SessionStore(config.max_sessions, config.tombstones, clock, config.tombstone_seconds)
        self._tenants = Tenants(config, self._store, clock)
        self._replays = Replays(
            config.replay_keys, config.replay_bytes_per_session, config.replay_bytes, config.tombstones
        )
        self.events = EventLog(config.event_ring, clock, config.tombstone_seconds)
        self._served: dict[str, Served] = {}
        for runner in runners:
            self._served[runner.spec.name] = Served(runner, config)

    @property
    def specs(self) -> dict[str, ModelSpec]:
        return {name: served.spec for name, served in self._served.items()}

    def create_session(
        self,
        model: str,
        *,
        tenant: str = "",
        session_id: str | None = None,
        batch_size: int = 1,
        max_length: int | None = None,
        ttl_seconds: float | None = None,
        pinned: bool = False,
        labels: dict[str, str] | None = None,
        like: PySequence[int] = (),
        once: Once | None = None,
    ) -> SessionInfo:
        """`like`: ids that a session of one row is about to be given. Of these it has at once what another past of the
        tenant begins with, sharing its blocks, but for the last one: `valid_length` says how many.

        Raises ModelNotFound, InvalidInput, SessionExists, QueueFull, QuotaExceeded, EngineStopped.
        """
        with self._lock:
            if (created := self._replays.find_created(tenant, once)) is not None:
                return created
            self._refuse_when_stopping()
            served = self._served.get(model)
            if served is None:
                raise ModelNotFound(model, sorted(self._served))
            longest = served.spec.max_length
            if max_length is not None and not 1 <= max_length <= longest:
                raise InvalidInput("max_length", f"must be 1 to {longest} for model {model}, got {max_length}")
            if not 1 <= batch_size <= MAX_BATCH_SIZE:
                raise InvalidInput("batch_size", f"must be 1 to {MAX_BATCH_SIZE}, got {batch_size}")
            check_ttl(ttl_seconds)
            self._expire()
            self._tenants.admit(tenant, sessions=1, pinned=int(pinned))
            session = self._store.open(
                tenant,
                model,
                max_length or longest,
                self._begun(served, tenant, like) if len(like) else [Sequence() for _ in range(batch_size)],
                session_id=session_id,
                ttl_seconds=ttl_seconds,
                pinned=pinned,
                labels=labels,
            )
            for sequence in session.sequences:
                served.pool.share(sequence.block_table)
            self._tenants.add(tenant, sessions=1, pinned=int(pinned))
            self.events.emit("created", session)
            self._tell()  # its end may be the next to come
            info = self._info(session)
            self._replays.remember_created(session, once, info)
            return info

    def session(self, session_id: str, tenant: str = "", *, expected_version: int | None = None) -> SessionInfo:
        """Raises SessionNotFound, SessionGone, Moved."""
        with self._lock:
            session = self._store.find(tenant, session_id)
            check_version(expected_version, session)
            return self._info(session)

    def begins_with(self, session_id: str, tenant: str, ids: PySequence[int]) -> int:
        """How many of these ids a session of one row begins with. Raises SessionNotFound, SessionGone."""
        with self._lock:
            return longest_prefix([self._store.find(tenant, session_id).sequences[0].history], ids)[1]

    def sessions(self, tenant: str | None = "", **wanted: Unpack[SessionFilter]) -> list[SessionInfo]:
        """The tenant's sessions (None: everybody's), or those of them that are wanted, oldest first."""
        with self._lock:
            self._expire()
            return [self._info(session) for session in self._store.select(tenant, wanted)]

    def update_session(
        self,
        session_id: str,
        tenant: str = "",
        *,
        expected_version: int | None = None,
        **changes: Unpack[SessionChanges],
    ) -> SessionInfo:
        """A merge patch of what is not the past, so no new version; a use, so its time to live begins anew.

        Raises SessionNotFound, SessionGone, Moved, InvalidInput, QuotaExceeded, EngineStopped.
        """
        with self._lock:
            self._refuse_when_stopping()
            session = self._store.find(tenant, session_id)
            check_version(expected_version, session)
            labels = merged_labels(session.labels, changes.get("labels", {}))
            check_ttl(changes.get("ttl_seconds"))
            pinned = changes.get("pinned", session.pinned)
            more = int(pinned) - int(session.pinned)
            self._tenants.admit(tenant, pinned=max(0, more))
            self._tenants.add(tenant, pinned=more)
            session.labels, session.pinned = labels, pinned
            session.ttl_seconds = changes.get("ttl_seconds", session.ttl_seconds)
            self._store.touch(session)
            self._tell()
            return self._info(session)

    def delete_session(
        self, session_id: str, tenant: str = "", *, expected_version: int | None = None, once: Once | None = None
    ) -> Receipt:
        """Frees every block now, also while an append runs: that append ends with SessionGone.

        Raises SessionNotFound, SessionGone, Moved.
        """
        with self._lock:
            if (deleted := self._replays.find_deleted(tenant, session_id, once)) is not None:
                return deleted
            session = self._store.find(tenant, session_id)
            self._replays.find(session, once)  # its key may be another request's
            check_version(expected_version, session)
            for sequence in session.sequences if len(session.sequences) == 1 else ():
                if sequence.block_table:  # what is deleted is kept for nobody
                    self._served[session.model].prefixes.drop_from(sequence.block_table[0])
            receipt = self._close(session, "deleted")
            self._replays.remember_deleted(session, once, receipt)
            return receipt

    def end_session(self, session_id: str, tenant: str, *, keep: bool) -> None:
        """Deletes one of one row that only one request knew of. `keep`: what it has stays, while nobody wants its
        blocks, for sessions that are created like it. Nothing is done when it is gone already."""
        with self._lock, contextlib.suppress(SessionNotFound, SessionGone):
            session = self._store.find(tenant, session_id)
            idle = session.state is SessionState.IDLE
            self._close(session, "deleted", to_keep=keep and idle, tombstone=False)

    def fork(
        self,
        session_id: str,
        *,
        tenant: str = "",
        count: int = 1,
        at: int | list[int] | None = None,
        expected_version: int | None = None,
        once: Once | None = None,
    ) -> list[SessionInfo]:
        """Children that share the parent's blocks up to `at` (default: its last commit), also while it is busy. They
        have its time to live and its labels, and are not pinned.

        Raises SessionNotFound, SessionGone, Moved, InvalidInput, QueueFull, QuotaExceeded.
        """
        with self._lock:
            parent = self._store.find(tenant, session_id)
            children: list[SessionInfo] | None = self._replays.find(parent, once)
            if children is not None:
                return children
            self._refuse_when_stopping()
            check_version(expected_version, parent)
            if not 1 <= count <= MAX_FORKS:
                raise InvalidInput("count", f"must be 1 to {MAX_FORKS}, got {count}")
            if len(self._store) + count > self.config.max_sessions:
                raise QueueFull(f"{count} more sessions pass the limit of {self.config.max_sessions}")
            lengths = parent.valid_length if at is None else row_lengths("at", at, parent)
            self._expire()
            self._tenants.admit(tenant, sessions=count)
            self._store.touch(parent)
            self._tenants.add(tenant, sessions=count)
            children = [self._info(self._fork_one(parent, lengths)) for _ in range(count)]
            self._replays.remember(parent, once, children, parent.version)
            return children

    def capacity(self, tenant: str = "") -> Capacity:
        """What there is, and what the tenant has and may have of it."""
        with self._lock:
            models = [served.capacity(self._of(name), tenant) for name, served in self._served.items()]
            own = self._tenants.quota(tenant), self._tenants.use(tenant)
            return Capacity(models, len(self._store), self._waiting, *own)

    def figures(self) -> list[Figures]:
        """What each model holds and has done, everybody's sessions together."""
        with self._lock:
            counted = {name: self.events.counts(name) for name in self._served}
            return [served.figures(open_sessions(counted[n]), counted[n]) for n, served in self._served.items()]

    # What operations move.

    def _truncate(self, served: Served, session: Session, lengths: list[int]) -> None:
        for sequence, length in zip(session.sequences, lengths, strict=True):
            if length < sequence.length:
                sequence.length = length
                sequence.tail = None
                del sequence.history[length:]
                served.scheduler.cut(sequence, length)
        session.version += 1
        self.events.emit("truncated", session)
        self._store.touch(session)

    def _begun(self, served: Served, tenant: str, ids: PySequence[int]) -> list[Sequence]:
        """The longest row that another session or a kept past has of these ids; its blocks have yet to be shared."""
        sessions = [each for each in self._store.newest(tenant, LOOKED_AT) if each.model == served.spec.name]
        sessions = [each for each in sessions if len(each.sequences) == 1]
        prefixes = served.prefixes.of(tenant)
        histories = [*(each.sequences[0].history for each in sessions), *(prefix.history for prefix in prefixes)]
        found, length = longest_prefix(histories, ids[:-1])
        if found is None:
            return [Sequence()]
        if found < len(sessions):
            return served.scheduler.forked(sessions[found], [length])
        prefix = prefixes[found - len(sessions)]
        served.prefixes.use(prefix)
        table = prefix.table[: blocks_for(length, self.config.block_size)]
        return [Sequence(length, table, prefix.history[:length])]

    def _fork_one(self, parent: Session, lengths: list[int]) -> Session:
        served = self._served[parent.model]
        child = self._store.open(
            parent.tenant,
            parent.model,
            parent.max_length,
            served.scheduler.forked(parent, lengths),
            ttl_seconds=parent.ttl_seconds,
            labels=parent.labels,
            parent=parent.id,
        )
        for sequence in child.sequences:
            served.pool.share(sequence.block_table)
        self.events.emit("forked", child)
        self._tell()
        return child

    def _close(self, session: Session, reason: Closing, *, to_keep: bool = False, tombstone: bool = True) -> Receipt:
        served = self._served[session.model]
        served.gather.arrived(session)
        positions = sum(session.valid_length)
        blocks = [block for sequence in session.sequences for block in sequence.block_table]
        blocks += served.scheduler.hand_over(session)
        self._store.close(session, reason, tombstone=tombstone)
        self.events.emit(reason, session)
        self._tenants.add(session.tenant, sessions=-1, pinned=-int(session.pinned))
        self._replays.forget(session)
        if to_keep and blocks:
            (sequence,) = session.sequences
            served.prefixes.keep(Prefix(session.tenant, sequence.history, sequence.block_table))
        freed = 0 if to_keep else served.pool.release(blocks)
        while session.waiting:
            reject(self._pop(session), SessionGone(reason))
        self._tell()
        return Receipt(session.id, positions, freed * served.block_bytes, freed, len(blocks) - freed)

    def _count(self, session: Session, operations: int) -> None:
        self._waiting += operations
        self._tenants.add(session.tenant, appends=operations)

    def _pop(self, session: Session) -> Operation:
        self._count(session, -1)
        operation: Operation = session.waiting.popleft()
        return operation

    def _expire(self) -> None:
        for session in self._store.expired():
            self._close(session, "expired")

    def _tell(self) -> None:
        self._has_news = True
        self._news.notify_all()

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise EngineStopped("the engine is stopping; nothing was applied")

    def _of(self, model: str) -> list[Session]:
        return [session for session in self._store if session.model == model]

    def _info(self, session: Session) -> SessionInfo:
        return self._served[session.model].info(session)


def resolve(future: Future[Any], result: object) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled by a caller who no longer waits
        future.set_result(result)


def reject(operation: Operation, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):
        operation.future.set_exception(error)
