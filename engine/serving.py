"""One model that is served: its runner and queue, and what can be told of them. Read and called by the engine only."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from engine.batch import Array, Batch, RowResult
from engine.blocks import BlockPool, blocks_for
from engine.gather import Gather
from engine.scheduler import Scheduler
from engine.session import Session, SessionState
from engine.specs import ModelSpec
from engine.stats import ModelCapacity, SessionInfo


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


@dataclass(frozen=True, slots=True)
class Served:
    runner: Runner
    scheduler: Scheduler
    gather: Gather
    block_size: int

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
            return self.runner.run(batch)
        tables, lengths = [row.table.tolist() for row in batch.rows], [row.stop for row in batch.rows]
        if work.transfer == "read_past":
            work.outputs = self.runner.read_past(tables, lengths)
        else:
            self.runner.write_past(tables, lengths, work.inputs)
        return [RowResult(tail=row.tail) for row in batch.rows]

    def info(self, session: Session) -> SessionInfo:
        blocks = [block for sequence in session.sequences for block in sequence.block_table]
        return SessionInfo(
            id=session.id,
            tenant=session.tenant,
            model=session.model,
            kind=self.spec.kind,
            state=session.state.value,
            valid_length=session.valid_length,
            max_length=session.max_length,
            version=session.version,
            blocks=len(blocks),
            shared_blocks=sum(self.pool.is_shared(block) for block in blocks),
            bytes=len(blocks) * self.block_bytes,
            parent=session.parent,
            labels=dict(session.labels),
            ttl_seconds=session.ttl_seconds,
            pinned=session.pinned,
            created_at=session.created_at,
            last_used_at=session.last_used_at,
            expires_at=session.expires_at,
        )

    def capacity(self, sessions: Iterable[Session]) -> ModelCapacity:
        """`sessions`: the model's."""
        pool = self.pool
        reserved = sum(
            len(sequence.block_table) - blocks_for(sequence.length, self.block_size)
            for session in sessions
            for sequence in session.sequences
        )
        counts = (pool.blocks - 1, pool.free, pool.used, pool.shared, reserved)
        return ModelCapacity(self.spec.name, self.block_size, self.block_bytes, *counts)

    def check(self, sessions: list[Session]) -> None:
        """Raises RuntimeError unless blocks, tables and lengths of the model's sessions agree."""
        sequences = [sequence for session in sessions for sequence in session.sequences]
        tables: list[Iterable[int]] = [sequence.block_table for sequence in sequences]
        self.pool.check([*tables, *self.scheduler.held_for_copies()])
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
