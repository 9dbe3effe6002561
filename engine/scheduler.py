"""Queue in, Batch out, for one model. Decides which rows run next and takes their blocks; touches no tensor.

Order: what is nearest to its end first (steps before chunks of a long prefill), tenants in turn, then first come first
served; while a tenant with a guarantee is at work, others have a small part of each batch (engine.turns). Steps leave
a long append a part of each batch, so neither ever waits for the other. An append gets *all* its blocks before its
first row runs, so two half-done appends can never wait for each other.
"""

from __future__ import annotations

from array import array
from itertools import chain

from engine.batch import Batch, Row, Work
from engine.blocks import BlockPool, blocks_for
from engine.config import EngineConfig
from engine.session import Sequence, Session, SessionState
from engine.turns import Guard, Turns

LONG_SHARE = 4  # a long append that is ready has one part in so many of a batch, however many steps there are


class Scheduler:
    def __init__(self, pool: BlockPool, config: EngineConfig, *, causal: bool) -> None:
        self.pool = pool
        self._block_size = config.block_size
        self._token_budget = config.token_budget
        self._max_rows = config.max_rows
        self._causal = causal
        self._queue: list[Work] = []
        self._turns = Turns()
        self._guard = Guard(pool.shares.guaranteed, config.guard_positions)

    def add(self, work: Work) -> None:
        session = work.session
        work.past_length = session.valid_length
        work.done = [0] * len(work.new)
        work.results = [[] for _ in work.new]
        work.replayed = [0] * len(work.new)
        work.shared_length = [self._shared_length(sequence) for sequence in session.sequences]
        self._queue.append(work)
        self._turns.arrived(work)
        self._guard.asked(session.tenant, work.submitted_at)

    def remove(self, work: Work) -> None:
        self._queue.remove(work)
        self._let_go(work)

    def forked(self, parent: Session, lengths: list[int]) -> list[Sequence]:
        """Its rows as its children have them, up to these lengths; the blocks have yet to be shared.

        An append that runs now may yet not be kept: the blocks that it put its own in place of are the past.
        """
        displaced = {own: shared for work in self._queue if work.session is parent for shared, own in work.copies}
        sequences = []
        for source, length in zip(parent.sequences, lengths, strict=True):
            blocks = source.block_table[: blocks_for(length, self._block_size)]
            table = array("i", [displaced.get(block, block) for block in blocks])
            tail = source.tail if length == source.length else None
            sequences.append(Sequence(length, table, source.history[:length], tail))
        return sequences

    def held_for_copies(self) -> list[tuple[str, list[int]]]:
        """(tenant, blocks)"""
        return [(work.session.tenant, [shared for shared, _ in work.copies]) for work in self._queue]

    def hand_over(self, session: Session) -> list[int]:
        """The blocks that its work holds beside its tables; whoever calls releases them."""
        held = []
        for work in self._queue:
            if work.session is session:
                held += [shared for shared, _ in work.copies]
                work.copies.clear()
        return held

    def __len__(self) -> int:
        return len(self._queue)

    def works(self) -> list[Work]:
        return list(self._queue)

    def deadlines(self, wait_seconds: float) -> list[float]:
        """When each work that still has no blocks will have waited that long."""
        return [work.submitted_at + wait_seconds for work in self._queue if not work.reserved]

    def schedule(self, now: float) -> Batch | None:
        """The next batch, or None: nothing is queued, or nothing that is queued can have its blocks now."""
        rows: list[Row] = []
        works: list[Work] = []
        short: set[Work] = set()  # of blocks
        budget = self._token_budget
        others = self._guard.others(now, budget)
        first, long = self._turns.order(self._queue)
        keep, keep_rows = 0, 0  # for a long one, of the budget and of the rows
        if any(not work.alone and self._is_ready(work) for work in long):
            keep, keep_rows = max(1, self._token_budget // LONG_SHARE), max(1, self._max_rows // LONG_SHARE)
        for place, work in enumerate(chain(first, long)):
            if budget <= 0 or len(rows) >= self._max_rows:
                break
            if place == len(first):
                keep, keep_rows = 0, 0
            guarded = self._guard.covers(work.session.tenant)
            if others <= 0 and not guarded:
                continue
            if rows and (_runs_alone(work) or _runs_alone(rows[0].work)):
                continue
            if rows and (budget <= keep or len(rows) + len(work.new) > self._max_rows - keep_rows):
                continue
            if not self._causal and work.size > budget and any(row.count > 1 or row.queries > 1 for row in rows):
                continue  # a free mask needs its whole append in one turn: one such append a batch may pass the budget
            if not work.reserved and not self._reserve(work):
                short.add(work)
                continue
            if work.started_at is None:
                work.started_at = now
            own = self._rows(work, max(1, budget - keep if guarded else min(budget - keep, others)))
            if own:
                works.append(work)
            for row in own:
                rows.append(row)
                size = max(row.count, row.queries, 1)
                budget -= size
                others -= 0 if guarded else size
        if not rows:
            return None
        self._turns.ran(works, [work for work in self._queue if work not in short])
        return Batch(rows, works)

    def roll_back(self, work: Work) -> None:
        """Takes the work out, its session's tables as they were before it: what it reserved is given back."""
        if work.session.state is not SessionState.CLOSED:  # closing released the tables already
            for sequence in work.session.sequences:
                self._restore(sequence, work.copies)
                self.cut(sequence, sequence.length)
        self.remove(work)

    def cut(self, sequence: Sequence, length: int) -> None:
        """Releases the blocks that `length` positions do not need."""
        keep = blocks_for(length, self._block_size)
        self.pool.release(sequence.block_table[keep:])
        del sequence.block_table[keep:]

    def blocks_needed(self, sequence: Sequence, new: int) -> int:
        """New blocks that an append takes now: to grow, and to leave a shared tail block that it would write to."""
        if new == 0:
            return 0
        grow = blocks_for(sequence.length + new, self._block_size) - len(sequence.block_table)
        return grow + self._writes_shared(sequence)

    def missing(self, work: Work) -> int:
        """How many more blocks than its tenant may take now a work needs to start."""
        return 0 if work.reserved else max(0, self.needed(work) - self.pool.available(work.session.tenant))

    def _is_ready(self, work: Work) -> bool:
        return work.reserved or self.pool.can_take(self.needed(work), work.session.tenant)

    def needed(self, work: Work) -> int:
        """How many blocks it takes to start."""
        pairs = zip(work.session.sequences, work.new, strict=True)
        return sum(self.blocks_needed(sequence, new) for sequence, new in pairs)

    def _shared_length(self, sequence: Sequence) -> int:
        return min(sequence.length, self.pool.shared_prefix(sequence.block_table) * self._block_size)

    def _writes_shared(self, sequence: Sequence) -> bool:
        at, offset = divmod(sequence.length, self._block_size)
        return offset != 0 and self.pool.is_shared(sequence.block_table[at])

    def _let_go(self, work: Work) -> None:
        self.pool.release(shared for shared, _ in work.copies)
        work.copies.clear()

    def _restore(self, sequence: Sequence, copies: list[tuple[int, int]]) -> None:
        """Puts a shared tail block back in place of the own one."""
        at = sequence.length // self._block_size
        for shared, own in copies:
            if at < len(sequence.block_table) and sequence.block_table[at] == own:
                sequence.block_table[at] = shared
                self.pool.release([own])
                copies.remove((shared, own))
                return

    def _reserve(self, work: Work) -> bool:
        sequences = work.session.sequences
        needed = list(map(self.blocks_needed, sequences, work.new))
        taken = self.pool.take(sum(needed), work.session.tenant)
        if taken is None:
            return False
        for sequence, new, count in zip(sequences, work.new, needed, strict=True) if taken else ():
            blocks, taken = taken[:count], taken[count:]
            if new and self._writes_shared(sequence):
                at = sequence.length // self._block_size
                shared, own = sequence.block_table[at], blocks.pop()
                work.copies.append((shared, own))  # the hold on the shared block goes over to the work
                sequence.block_table[at] = own
            sequence.block_table.extend(blocks)
        work.reserved = True
        return True

    def _rows(self, work: Work, budget: int) -> list[Row]:
        """The work's next rows within the budget; a work that may not be cut gives all of them."""
        rows = []
        for index, sequence in enumerate(work.session.sequences):
            left = work.new[index] - work.done[index]
            if left == 0 and not work.queries and not work.is_peek and work.transfer is None:
                continue
            count = min(left, budget) if self._causal and work.transfer is None else left
            if left and count <= 0:
                break
            start = work.past_length[index] + work.done[index]
            rows.append(
                Row(
                    work=work,
                    index=index,
                    start=start,
                    stop=start + count,
                    queries=count if work.queries is None else work.queries,
                    table=array("i", sequence.block_table),
                    history=sequence.history,
                    tail=sequence.tail,
                    last=count == left,
                )
            )
            budget -= count
        return rows


def _runs_alone(work: Work) -> bool:
    return work.alone or work.transfer is not None
