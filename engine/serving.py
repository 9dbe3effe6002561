"""One model that is served: its runner and queue, and what can be told of them. Read and called by the engine only."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from engine.admission import Room
from engine.batch import Array, Batch, RowResult
from engine.blocks import NULL_BLOCK, BlockPool, blocks_for
from engine.config import EngineConfig
from engine.errors import InvalidInput, ModelFailed
from engine.events import EventKind
from engine.eviction import victims
from engine.gather import Gather
from engine.prefix import Prefixes
from engine.scheduler import Scheduler
from engine.session import Session, SessionState
from engine.shares import Shares
from engine.specs import ModelSpec
from engine.stats import ModelCapacity, SessionInfo
from engine.tally import Figures, Tally

EVICT_SECONDS = 0.1  # until sessions are looked through again after none of them could go


class Runner(Protocol):
    """What runs a batch on a device. `blocks` counts the null block."""

    spec: ModelSpec
    blocks: int

    def run(self, batch: Batch) -> list[RowResult]:
        """Copies the batch's blocks, then one forward pass; a result a row, in order."""
        ...

    def read_past(self, tables: list[list[int]], lengths: list[int]) -> dict[str, Array]:
        """A row's first `lengths` positions in its block table -> keys and values as `ModelSpec.past_tensors` has them,
        T the longest length, zero past a row's own."""
        ...

    def write_past(self, tables: list[list[int]], lengths: list[int], arrays: dict[str, Array]) -> None:
        """The other way: T is at least the longest length, and what stands past a row's own is not written."""
        ...

    def zero(self, blocks: list[int]) -> None:
        """Nothing of what was written to them is left."""
        ...


class Served:
    """Raises InvalidInput when more blocks are guaranteed than there are."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        try:
            shares = Shares(runner.blocks - 1, config)
        except ValueError as error:
            raise InvalidInput("quotas", f"model {runner.spec.name}: {error}; lower them or give it more") from None
        self.runner = runner
        self.block_size = config.block_size
        pool = BlockPool(runner.blocks, shares, zero=config.zero_freed)
        self.scheduler = Scheduler(pool, config, causal=runner.spec.causal)
        self.prefixes = Prefixes(pool, config.prefixes)
        self.gather = Gather(config.gather_share)
        self.tally = Tally()
        self.evict_after = 0.0  # there is nothing to evict until then

    @property
    def spec(self) -> ModelSpec:
        return self.runner.spec

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.pool

    @property
    def block_bytes(self) -> int:
        return self.spec.kv.position_bytes * self.block_size

    def execute(self, batch: Batch) -> list[RowResult]:
        """The batch on the device; a result a row, in order."""
        work = batch.rows[0].work
        if work.transfer is None:
            results = self.runner.run(batch)
            if len(results) != len(batch.rows):
                raise ModelFailed(f"the model gave {len(results)} results for {len(batch.rows)} rows")
            return results
        tables, lengths = [row.table.tolist() for row in batch.rows], [row.stop for row in batch.rows]
        if work.transfer == "read_past":
            work.outputs = self.runner.read_past(tables, lengths)
        else:
            self.runner.write_past(tables, lengths, work.inputs)
        return [RowResult(tail=row.tail) for row in batch.rows]

    def zero(self, blocks: list[int]) -> None:
        """And the null block, where positions were replayed that may have been theirs."""
        self.runner.zero([NULL_BLOCK, *blocks])

    def room(self, tenant: str) -> Room:
        """What the tenant may ever hold."""
        return Room(self.pool.shares.most(tenant), self.block_size)

    def make_room(self) -> None:
        """What waits for blocks has them before any past without a session, its own tenant's first to go."""
        if not self.prefixes:
            return
        for work in self.scheduler.works():
            while self.scheduler.missing(work):
                if not self.prefixes.drop_one(work.session.tenant) and not self.prefixes.drop_one():
                    break

    def to_evict(self, sessions: list[Session], now: float) -> list[Session]:
        """Those whose end gives a work that waits the blocks it lacks. `sessions`: the model's."""
        if now < self.evict_after:
            return []
        for work in self.scheduler.works():
            if self.scheduler.missing(work):
                chosen = victims(sessions, self.pool, work.session.tenant, self.scheduler.needed(work))
                if chosen:
                    return chosen
                self.evict_after = now + EVICT_SECONDS
        return []

    def info(self, session: Session) -> SessionInfo:
        tables = [sequence.block_table for sequence in session.sequences]
        blocks = sum(map(len, tables))
        return SessionInfo(
            id=session.id,
            tenant=session.tenant,
            model=session.model,
            kind=self.spec.kind,
            state=session.state.value,
            valid_length=session.valid_length,
            max_length=session.max_length,
            version=session.version,
            blocks=blocks,
            shared_blocks=sum(map(self.pool.shared_prefix, tables)),
            bytes=blocks * self.block_bytes,
            parent=session.parent,
            labels=dict(session.labels),
            ttl_seconds=session.ttl_seconds,
            pinned=session.pinned,
            created_at=session.created_at,
            last_used_at=session.last_used_at,
            expires_at=session.expires_at,
        )

    def capacity(self, sessions: Iterable[Session], tenant: str) -> ModelCapacity:
        """`sessions`: the model's. `tenant`: who asks."""
        pool = self.pool
        reserved = sum(
            len(sequence.block_table) - blocks_for(sequence.length, self.block_size)
            for session in sessions
            for sequence in session.sequences
        )
        spare, unshared = self.prefixes.spare()  # as good as free
        free, shared = pool.free + spare.total(), pool.shared - unshared
        own, available = pool.shares.used(tenant) - spare[tenant], pool.shares.available(tenant, pool.free, spare)
        counts = (pool.blocks - 1, free, pool.blocks - 1 - free, shared, reserved, own, available)
        return ModelCapacity(self.spec.name, self.block_size, self.block_bytes, *counts)

    def figures(self, sessions: int, events: Mapping[EventKind, int]) -> Figures:
        """`sessions`: how many the model has. Looks at those that run alone, so that many idle ones cost nothing."""
        works = [work for work in self.scheduler.works() if work.session.state is SessionState.RUNNING]
        started = sum(work.started_at is not None or work.future is None for work in works)  # or a generation goes on
        return Figures(
            spec=self.spec,
            capacity=self.capacity([work.session for work in works], ""),
            sessions={"idle": sessions - len(works), "running": len(works)},
            running=started,
            waiting=sum(len(work.session.waiting) for work in works) - started,
            events=events,
            tally=self.tally.copy(),
        )

    def check(self, sessions: list[Session]) -> None:
        """Raises RuntimeError unless blocks, tables and lengths of the model's sessions agree."""
        tables = [(session.tenant, sequence.block_table) for session in sessions for sequence in session.sequences]
        held = self.scheduler.held_for_copies()
        self.pool.check([*tables, *held, *((prefix.tenant, prefix.table) for prefix in self.prefixes)])
        for _, table in [] if any(blocks for _, blocks in held) else tables:
            if sum(map(self.pool.is_shared, table)) != self.pool.shared_prefix(table):
                raise RuntimeError(f"the shared blocks of a table are not its first: {table}")
        for session in sessions:
            self._check_session(session)

    def _check_session(self, session: Session) -> None:
        for sequence in session.sequences:
            needed = blocks_for(sequence.length, self.block_size)
            blocks = len(sequence.block_table)
            if blocks < needed or (session.state is SessionState.IDLE and blocks > needed):
                raise RuntimeError(f"{session!r} has {blocks} blocks in a table that needs {needed}")
            if self.spec.history is not None and len(sequence.history) != sequence.length:
                raise RuntimeError(f"{session!r} keeps {len(sequence.history)} ids of {sequence.length} positions")
            if sequence.length > session.max_length:
                raise RuntimeError(f"{session!r} passes its max_length {session.max_length}")
        if session.state is SessionState.IDLE and session.waiting:
            raise RuntimeError(f"{session!r} is idle and has {len(session.waiting)} operations waiting")
