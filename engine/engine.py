"""The engine: admit, run_once (schedule, run, commit), roll back. Everything a transport calls is here, or in `books`.

Threads: one thread calls `run_once` and `wait`; any thread may call the rest. What is decided (sessions, blocks,
queues) is guarded by one lock that is never held through a forward pass, so forking or deleting never waits for the
model. A block freed while a forward pass still writes to it is safe: only `run_once` hands blocks out, afterwards.
"""

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from engine.admission import (
    check_inputs,
    check_version,
    check_want,
    new_positions,
    prompt_positions,
    query_count,
    row_lengths,
)
from engine.batch import (
    Append,
    AppendResult,
    Batch,
    ExportPast,
    ExportResult,
    Generate,
    ImportPast,
    Once,
    Operation,
    RowResult,
    Transfer,
    Truncate,
    Want,
    Work,
)
from engine.books import Books, reject, resolve
from engine.errors import (
    EngineError,
    EngineStopped,
    InvalidInput,
    ModelFailed,
    PoolExhausted,
    QueueFull,
)
from engine.generation import Generation
from engine.past import check_export, check_past, export_past, import_positions
from engine.results import gather
from engine.serving import Served
from engine.session import Session, SessionState
from engine.tally import Pace
from engine.tenants import counts_by_tenant
from engine.trail import Trail


class Engine(Books):
    # Operations: in arrival order per session, answered through their future.

    def submit(self, operation: Operation) -> None:
        """Queues it behind the session's others. Raises what can be said at once (not found, gone, invalid, full).

        An import is read through first, which takes a while for a large one; not under the lock.
        """
        if isinstance(operation, ImportPast):
            info = self.session(operation.session_id, operation.tenant)
            check_past(self._served[info.model].spec, operation.past, len(info.valid_length))
        with self._lock:
            session = self._store.find(operation.tenant, operation.session_id)
            if self._replay(operation, session):
                return
            self._refuse_when_stopping()
            self._check_now(operation, session)
            if len(session.waiting) >= self.config.max_waiting_per_session:
                raise QueueFull(f"{len(session.waiting)} operations wait on this session already")
            if self._waiting >= self.config.max_waiting:
                raise QueueFull(f"{self._waiting} operations wait already")
            self._tenants.admit(operation.tenant, appends=1)
            self._count(session, 1)
            session.waiting.append(operation)
            if not isinstance(operation, ExportPast):  # a read is no use
                self._store.touch(session)
            self._advance(session)
            until = self._held_until(self._served[session.model])
            if until is None or until < self._wakes_at:
                self._tell()

    def repeated(self, session_id: str, tenant: str, digest: bytes) -> str | None:
        """The key of the newest of the session's changes, done or yet to be, if its request had this digest.

        Raises SessionNotFound, SessionGone.
        """
        with self._lock:
            return self._replays.newest(self._store.find(tenant, session_id), digest)

    def recalls(self, session_id: str, tenant: str, once: Once, expected_version: int | None) -> bool:
        """Whether `submit` would answer with what was done before. Raises SessionNotFound, SessionGone, KeyReused,
        ReplyDropped."""
        with self._lock:
            session = self._store.find(tenant, session_id)
            return self._replays.find(session, replace(once), expected_version) is not None

    def submit_all(self, operations: Iterable[Operation]) -> list[EngineError | None]:
        """Submits each, all before anything is scheduled, so that they may share a batch. What `submit` raises, or
        None."""

        def submitted(operation: Operation) -> EngineError | None:
            try:
                self.submit(operation)
            except EngineError as error:
                return error
            return None

        with self._lock:
            return [submitted(operation) for operation in operations]

    def run_once(self) -> bool:
        """One turn: for every model that can, schedule a batch, run it, commit. False: there was nothing to run yet.

        Raises what `fail` was given, and what a runner raises that is no Exception: then only `abort` is left to do.
        """
        ran = False
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._has_news = self._has_held = False
        for served in self._served.values():
            with self._lock:
                try:
                    served.make_room()
                    self._sweep(served)
                    if self._held_until(served) is not None:
                        self._has_held = True
                        continue
                    batch = served.scheduler.schedule(self._clock())
                except Exception as error:
                    self._fail_unreserved(served, error)
                    ran = True
                    continue
                ran |= self._evict(served)
                if batch is None:
                    continue
                for work in batch.works:
                    if work.future is not None and not work.told:
                        work.told = True
                        work.future.set_running_or_notify_cancel()  # from here on it commits
            ran = True
            self._run(served, batch)
        for served in self._served.values():
            ran |= self._zero(served)
        return ran

    def wait(self, timeout: float | None = None) -> None:
        """Returns when `run_once` may have something to do, or after `timeout` seconds."""
        with self._lock:
            if self._has_news or any(served.pool.soiled for served in self._served.values()):
                return
            deadlines = [] if self._store.next_expiry is None else [self._store.next_expiry]
            for served in self._served.values():
                deadlines.extend(served.scheduler.deadlines(self.config.wait_seconds))
                if served.evict_after > self._clock():
                    deadlines.append(served.evict_after)
            waits = [] if timeout is None else [timeout]
            if deadlines:
                waits.append(max(0.0, min(deadlines) - self._clock()) + 0.001)
            held = [until for served in self._served.values() if (until := self._held_until(served)) is not None]
            if self._has_held and not held:
                return  # its time came after `run_once` had looked
            if held:
                waits.append(max(0.0, min(held) - self._clock()))
            seconds = min(waits, default=None)
            self._wakes_at = math.inf if seconds is None else self._clock() + seconds
            self._news.wait(seconds)
            self._wakes_at = math.inf

    def stop(self) -> None:
        """Refuses new work from now on. What runs or waits still ends; call `run_once` until `idle`."""
        with self._lock:
            self._stopping = True
            self._tell()

    def abort(self, error: BaseException) -> None:
        """Ends everything that waits with the error; the sessions stay as they are."""
        with self._lock:
            self._stopping = True
            for session in self._store:
                while len(session.waiting) > 1:
                    self._count(session, -1)
                    reject(session.waiting.pop(), error)
            for served in self._served.values():
                for work in served.scheduler.works():
                    self._fail(served, work, error)

    def fail(self, error: BaseException) -> None:
        """What runs the models is gone: new work is refused from now on, and `run_once` raises the error."""
        with self._lock:
            self._stopping = True
            self._failure = error
            self._tell()

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def idle(self) -> bool:
        with self._lock:
            return self._waiting == 0

    def check(self) -> None:
        """Raises RuntimeError unless blocks, tables, lengths and queues agree. Call it any time."""
        with self._lock:
            for name, served in self._served.items():
                served.check(self._of(name))
            if self._waiting != sum(len(session.waiting) for session in self._store):
                raise RuntimeError(f"{self._waiting} operations are counted as waiting, the queues say otherwise")
            self._tenants.check(counts_by_tenant(self._store))
            self._replays.check()

    # What runs.

    def _run(self, served: Served, batch: Batch) -> None:
        began, started = self._clock(), time.perf_counter()
        error: Exception | None = None
        results: list[RowResult] = []
        try:
            results = served.execute(batch)
        except Exception as failure:  # the model's own code may raise anything; one batch is lost, the engine is not
            error = failure
        elapsed_ms = (time.perf_counter() - started) * 1e3
        with self._lock:
            self._has_news = True
            served.gather.ran(batch, began, self._clock())
            served.tally.batch(batch, elapsed_ms / 1e3)
            for work in batch.works:
                work.compute_ms += elapsed_ms
            if error is None:
                self._book(served, batch, results)
            elif len(batch.works) > 1:
                for work in batch.works:
                    work.alone = True
            else:
                self._fail(served, batch.works[0], _as_engine_error(error))

    def _book(self, served: Served, batch: Batch, results: list[RowResult]) -> None:
        for row, result in zip(batch.rows, results, strict=True):
            row.work.done[row.index] += row.count
            row.work.replayed[row.index] += row.replay
            row.work.results[row.index].append(result)
        for work in batch.works:
            work.alone = False
            work.copied = True
            if work.done == work.new and work.session.state is not SessionState.CLOSED:
                self._commit(served, work)

    def _commit(self, served: Served, work: Work) -> None:
        """The append becomes part of the past: everything that can fail has happened before the first change."""
        session, history = work.session, served.spec.history
        try:
            outputs = gather(work)
            ids = [work.inputs[history][row, :n].tolist() if history and n else [] for row, n in enumerate(work.new)]
        except Exception as error:
            self._fail(served, work, _as_engine_error(error))
            return
        if not work.keep:
            served.scheduler.roll_back(work)
            self._store.touch(session)
            work.finish(work, outputs, None)
            return
        for index, (sequence, new) in enumerate(zip(session.sequences, work.new, strict=True)):
            sequence.history.extend(ids[index])
            sequence.length += new
            if work.results[index]:
                sequence.tail = work.results[index][-1].tail
        if work.changes:
            session.version += 1
            self.events.emit("committed" if work.transfer is None else "imported", session)
        elif work.transfer is not None:
            self.events.emit("exported", session)
        if work.transfer != "read_past":
            self._store.touch(session)
        served.scheduler.remove(work)
        work.finish(work, outputs, None)

    def _fail(self, served: Served, work: Work, error: BaseException) -> None:
        self._tenants.never_ran(work)
        served.scheduler.roll_back(work)
        work.finish(work, {}, error)

    def _fail_unreserved(self, served: Served, error: Exception) -> None:
        """The books failed while blocks were given out: whoever has none yet has changed nothing, and is told. Raises
        the error when that is nobody."""
        works = [work for work in served.scheduler.works() if not work.reserved]
        if not works:
            raise error
        for work in works:
            self._fail(served, work, _as_engine_error(error, "the engine"))

    def _sweep(self, served: Served) -> None:
        """Drops what will not run: sessions past their time, works of closed sessions, cancelled or overdue ones."""
        self._expire()
        now = self._clock()
        for work in served.scheduler.works():
            if work.session.state is SessionState.CLOSED:
                self._tenants.never_ran(work)
                served.scheduler.remove(work)
            elif work.started_at is None and work.future is not None and work.future.cancelled():
                self._fail(served, work, EngineStopped("cancelled before it was scheduled"))
            elif work.submitted_at + self.config.wait_seconds <= now and served.scheduler.missing(work):
                waited = f"no blocks came free within {self.config.wait_seconds:g} s; delete or truncate a session"
                self._fail(served, work, PoolExhausted(waited))

    def _zero(self, served: Served) -> bool:
        """Zeroes some of the freed blocks; False: there are none. No pass runs meanwhile that could write to them."""
        with self._lock:
            blocks = served.pool.to_zero(max(1, self.config.zero_bytes // served.block_bytes))
        if not blocks:
            return False
        served.zero(blocks)
        with self._lock:
            served.pool.zeroed()
        return True

    def _evict(self, served: Served) -> bool:
        """Closes idle sessions until what waits for blocks can have them; False: nothing waits, or none may go."""
        chosen = served.to_evict(self._of(served.spec.name), self._clock()) if self.config.evict == "lru" else []
        for session in chosen:
            self._close(session, "evicted")
        return bool(chosen)

    # What starts and ends.

    def _advance(self, session: Session) -> None:
        """Starts the session's waiting operations until one is in the engine."""
        while session.state is SessionState.IDLE and session.waiting:
            operation = session.waiting[0]
            if operation.future.cancelled():
                self._pop(session)
                continue
            try:
                if self._replay(operation, session):
                    self._pop(session)
                else:
                    self._start(operation, session)
            except Exception as error:  # one that nobody foresaw ends this operation, and no other waits for it
                self._pop(session)
                reject(operation, _as_engine_error(error, "the engine"))

    def _start(self, operation: Operation, session: Session) -> None:
        served = self._served[session.model]
        if isinstance(operation, Truncate):
            check_version(operation.expected_version, session)
            self._truncate(served, session, row_lengths("length", operation.length, session))
            self._done(operation, session, self._info(session), session.version - 1)
        elif isinstance(operation, Append):
            new = new_positions(served.spec, operation, session, served.room(session.tenant))
            queries = query_count(served.spec, operation)
            self._admit(served, session, new, sum(max(count, queries or 0) for count in new))
            self._add(
                served,
                session,
                operation.inputs,
                new,
                operation.want,
                self._end_append,
                operation.future,
                queries=queries,
                keep=operation.keep,
            )
        elif isinstance(operation, ExportPast):
            check_export(served.spec, operation, session, self.config.max_past_bytes)
            new = [0] * len(session.sequences)
            self._add(served, session, {}, new, Want(), self._end_append, operation.future, "read_past")
        elif isinstance(operation, ImportPast):
            new = import_positions(operation, session, served.room(session.tenant))
            self._admit(served, session, new, sum(new))
            arrays = operation.past.arrays
            self._add(served, session, arrays, new, Want(), self._end_append, operation.future, "write_past")
        else:
            check_version(operation.expected_version, session)
            new = prompt_positions(served.spec, operation, session, served.room(session.tenant))
            self._admit(served, session, new, max(sum(new), len(new)))
            self._begin_generation(served, session, operation, new)

    def _add(
        self,
        served: Served,
        session: Session,
        inputs: dict[str, Any],
        new: list[int],
        want: Want,
        finish: Callable[[Work, dict[str, Any], BaseException | None], None],
        future: Future[Any] | None = None,
        transfer: Transfer | None = None,
        queries: int | None = None,
        keep: bool = True,
    ) -> None:
        work = Work(session, inputs, new, want, finish, self._clock(), queries, future=future, keep=keep)
        work.transfer = transfer
        self._tenants.owe(session.tenant, work.size)
        served.scheduler.add(work)
        served.gather.arrived(session)
        session.state = SessionState.RUNNING  # last: what fails before has started nothing

    def _end_append(self, work: Work, outputs: dict[str, Any], error: BaseException | None) -> None:
        session = work.session
        if session.state is SessionState.CLOSED:
            return
        operation: Append | ExportPast | ImportPast = session.waiting[0]
        seconds = self._clock() - work.submitted_at
        self._tenants.took(seconds)
        if operation.trail is not None:
            self._follow(operation.trail, work)
        session.state = SessionState.IDLE
        result: object = None
        if error is None:
            try:
                result = self._result(operation, work, outputs)
            except MemoryError as failure:  # only an export's result is large, and an export has changed nothing
                error = _as_engine_error(failure, "the engine")
        if error is None:
            self._served[session.model].tally.ended(operation, work, seconds)
            self._done(operation, session, result, session.version - work.changes)
        else:
            reject(self._pop(session), error)
        self._advance(session)

    def _done(self, operation: Operation, session: Session, result: object, before: int) -> None:
        """Ends an operation that was applied to the session, which was at version `before`: remembered, then told."""
        self._pop(session)
        self._replays.remember(session, operation.once, result, before)
        if operation.trail is not None:
            operation.trail.committed = self._clock()
        resolve(operation.future, result)

    def _replay(self, operation: Operation, session: Session) -> bool:
        """Answers it with what was done before, if it was. Raises KeyReused, ReplyDropped."""
        result = self._replays.find(session, operation.once, operation.expected_version)
        if result is not None:
            if operation.trail is not None:
                operation.trail.committed = self._clock()
            resolve(operation.future, result)
        return result is not None

    def _result(self, operation: Operation, work: Work, outputs: dict[str, Any]) -> object:
        session = work.session
        if isinstance(operation, ImportPast):
            return self._info(session)
        if isinstance(operation, ExportPast):
            return ExportResult(export_past(self._served[session.model].spec, session, outputs), session.version)
        lengths = work.past_length, work.present_length
        return AppendResult(outputs, *lengths, session.version, work.queue_ms, work.compute_ms, work.effort)

    def _begin_generation(self, served: Served, session: Session, operation: Generate, new: list[int]) -> None:
        began_at = session.version
        if operation.at is not None:
            self._truncate(served, session, row_lengths("at", operation.at, session))
        generation = Generation(operation, session, began_at)
        pace = Pace(served.tally, self._clock())

        def turn_ended(work: Work, outputs: dict[str, Any], error: BaseException | None) -> None:
            if session.state is SessionState.CLOSED:
                return
            generation.ran(work)
            if operation.trail is not None:
                self._follow(operation.trail, work)
            try:
                if error is not None:
                    raise error
                if any(generation.new):
                    event = generation.committed()
                    now = self._clock()
                    pace.committed(work.new, now)
                    if operation.trail is not None:
                        operation.trail.drew(now)
                    if operation.on_token is not None:
                        operation.on_token(event)
                else:
                    pace.prompted(work.new)
                if work.want.sample is not None:
                    generation.draw(outputs)
                if work.want.sample is not None and any(generation.new):
                    want = Want() if generation.next_is_last else generation.want
                    self._add(served, session, {"token_ids": generation.token_ids}, generation.new, want, turn_ended)
                    return
            except Exception as failure:  # also what `stop` and `on_token` raise
                error = failure
            session.state = SessionState.IDLE
            if error is None:
                result = generation.result()
                pace.ended(result, self._clock())
                self._done(operation, session, result, generation.began_at)
            else:
                operation.partial = generation.partial(error)
                if operation.partial is not None:
                    self._replays.remember(session, operation.once, operation.partial, generation.began_at)
                elif generation.left_a_prompt:
                    self._truncate(served, session, generation.past_length)
                reject(self._pop(session), error)
            self._advance(session)

        self._add(served, session, operation.inputs, new, generation.want, turn_ended, operation.future)

    # Small things.

    def _follow(self, trail: Trail, work: Work) -> None:
        ended = self._served[work.session.model].gather.ended
        trail.ran(work.session.model, work.submitted_at, work.started_at, ended, max(map(len, work.results)))

    def _check_now(self, operation: Operation, session: Session) -> None:
        spec = self._served[session.model].spec
        if isinstance(operation, Append):
            check_inputs(spec, operation, len(session.sequences))
        elif isinstance(operation, Generate):
            if spec.history is None:
                raise InvalidInput("model", f"{spec.name} takes tensors and has nothing to generate; step it")
            if operation.max_tokens < 1:
                raise InvalidInput("max_tokens", f"must be at least 1, got {operation.max_tokens}")
            want = Want(sample=operation.sample, top_logprobs=operation.top_logprobs)
            if operation.inputs:
                check_inputs(spec, Append(operation.session_id, operation.inputs, want=want), len(session.sequences))
            check_want(spec, want)

    def _held_until(self, served: Served) -> float | None:
        return served.gather.hold_until(len(served.scheduler), self._clock())

    def _admit(self, served: Served, session: Session, new: list[int], positions: int) -> None:
        """Raises QuotaExceeded. Whether blocks are free is another question, and may be waited for."""
        needed = sum(map(served.scheduler.blocks_needed, session.sequences, new))
        while needed > served.pool.shares.left(session.tenant) and served.prefixes.drop_one(session.tenant):
            pass
        self._tenants.admit_blocks(session.tenant, served.pool.shares, needed)
        self._tenants.admit_positions(session.tenant, positions)


def _as_engine_error(error: Exception, what: str = "the model") -> EngineError:
    if isinstance(error, EngineError):
        return error
    failed = ModelFailed(f"{what} failed ({type(error).__name__}); the session is unchanged")
    failed.__cause__ = error
    return failed
