"""Queue in, Batch out, for one model. Decides which rows run next and takes their blocks; touches no tensor.

Order: what is nearest to its end first (steps before chunks of a long prefill), then first come first served. An
append gets *all* its blocks before its first row runs, so two half-done appends can never wait for each other.
"""

from __future__ import annotations

from array import array

from engine.batch import Batch, Row, Work
from engine.blocks import BlockPool, blocks_for
from engine.config import EngineConfig
from engine.session import Sequence, Session, SessionState


class Scheduler:
    def __init__(self, pool: BlockPool, config: EngineConfig, *, causal: bool) -> None:
        self.pool = pool
        self._block_size = config.block_size
        self._token_budget = config.token_budget
        self._max_rows = config.max_rows
        self._causal = causal
        self._queue: list[Work] = []

    def add(self, work: Work) -> None:
        session = work.session
        work.past_length = session.valid_length
        work.done = [0] * len(work.new)
        work.results = [[] for _ in work.new]
        self._queue.append(work)

    def remove(self, work: Work) -> None:
        self._queue.remove(work)
        self._let_go(work)

    def copied(self, work: Work) -> None:
        """A batch has copied its shared blocks. What is kept needs them no more; a score gets them back at its end."""
        work.copied = True
        if work.keep:
            self._let_go(work)

    def displaced(self, session: Session) -> dict[int, int]:
        """Own blocks that stand in the session's tables for now, and the shared ones that are its committed past."""
        return {own: shared for work in self._queue if work.session is session for shared, own in work.copies}

    def held_for_copies(self) -> list[list[int]]:
        return [[shared for shared, _ in work.copies] for work in self._queue]

    def works(self) -> list[Work]:
        return list(self._queue)

    def deadlines(self, wait_seconds: float) -> list[float]:
        """When each work that still has no blocks will have waited that long."""
        return [work.submitted_at + wait_seconds for work in self._queue if not work.reserved]

    def schedule(self, now: float) -> Batch | None:
        """The next batch, or None: nothing is queued, or nothing that is queued can have its blocks now."""
        rows: list[Row] = []
        budget = self._token_budget
        for work in self._in_order():
            if rows and (_runs_alone(work) or _runs_alone(rows[0].work)):
                continue
            if budget <= 0 or len(rows) + len(work.new) > max(self._max_rows, len(work.new)):
                break
            if not self._causal and _size(work) > budget and any(row.count > 1 or row.queries > 1 for row in rows):
                continue  # a free mask needs its whole append in one turn: one such append a batch may pass the budget
            if not work.reserved and not self._reserve(work):
                continue
            if work.started_at is None:
                work.started_at = now
            for row in self._rows(work, budget):
                rows.append(row)
                budget -= max(row.count, row.queries, 1)
        return Batch(rows) if rows else None

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

    def _in_order(self) -> list[Work]:
        """A transfer is one copy however long, and would wait for ever behind steps if it came after them."""
        return sorted(self._queue, key=lambda work: work.transfer is None and _is_long(work))

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
        pairs = list(zip(work.session.sequences, work.new, strict=True))
        taken = self.pool.take(sum(self.blocks_needed(sequence, new) for sequence, new in pairs))
        if taken is None:
            return False
        for sequence, new in pairs:
            needed = self.blocks_needed(sequence, new)
            blocks, taken = taken[:needed], taken[needed:]
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


def _is_long(work: Work) -> bool:
    """Whether more than a step of it is left."""
    left = max(new - done for new, done in zip(work.new, work.done, strict=True))
    return max(left, work.queries or 0) > 1


def _size(work: Work) -> int:
    """What the whole work takes of a budget."""
    return sum(max(new, work.queries or 0) for new in work.new)
