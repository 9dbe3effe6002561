"""In which order the works of a queue are looked at when a batch is made.

    1. who was passed over too often, first come first served
    2. steps, and transfers, which are one copy however long
    3. longer appends, of which a batch takes a chunk

In 2 and 3 the tenants take turns, row by row; the one that was served longest ago begins. A tenant's own works stay in
the order of their arrival.
"""

import heapq
from collections.abc import Callable, Iterable
from itertools import islice

from engine.batch import Work

GUARDED = 1.0  # seconds after its last append that a tenant with a guarantee counts as at work
PATIENCE = 8  # batches that a work was ready for and had no place in, until it comes first


class Turns:
    def __init__(self) -> None:
        self._batch = 0
        self._served: dict[str, int] = {}  # tenants of the queue: their last batch, or the one before they came

    def arrived(self, work: Work) -> None:
        self._served.setdefault(work.session.tenant, self._batch)

    def ran(self, works: Iterable[Work], ready: Iterable[Work]) -> None:
        """The works of a batch, and all that could have been in it."""
        self._batch += 1
        for work in ready:
            work.passed += 1
        for work in works:
            work.passed = 0
            self._served[work.session.tenant] = self._batch

    def order(self, queue: list[Work]) -> tuple[list[Work], list[Work]]:
        """Those of 1 and 2, and those of 3."""
        overdue: list[Work] = []
        short: list[Work] = []
        long: list[Work] = []
        for work in queue:
            (overdue if work.passed >= PATIENCE else long if is_long(work) else short).append(work)
        here = {work.session.tenant for work in queue}
        self._served = {tenant: batch for tenant, batch in self._served.items() if tenant in here}
        short, long = self._in_turn(short), self._in_turn(long)
        return ([*overdue, *short] if overdue else short), long

    def _in_turn(self, works: list[Work]) -> list[Work]:
        by_tenant: dict[str, list[Work]] = {}
        for work in works:
            by_tenant.setdefault(work.session.tenant, []).append(work)
        if len(by_tenant) < 2:
            return works
        tenants = sorted(by_tenant, key=lambda tenant: self._served[tenant])
        queues = [iter(by_tenant[tenant]) for tenant in tenants]
        heap = [(0, place) for place in range(len(queues))]  # (rows so far, whose)
        order: list[Work] = []
        while heap:
            rows, place = heapq.heappop(heap)
            for work in islice(queues[place], 1):
                order.append(work)
                heapq.heappush(heap, (rows + len(work.new), place))
        return order


class Guard:
    """While a tenant with a guarantee is at work, others have only so many positions of a batch: its steps wait for the
    batch that runs and for their own, and both must be short."""

    def __init__(self, guaranteed: Callable[[str], int], positions: int) -> None:
        """`guaranteed`: a tenant's blocks; `positions`: what others have then."""
        self._guaranteed = guaranteed
        self._positions = positions
        self._until = float("-inf")

    def covers(self, tenant: str) -> bool:
        return self._guaranteed(tenant) > 0

    def asked(self, tenant: str, now: float) -> None:
        if self.covers(tenant):
            self._until = now + GUARDED

    def others(self, now: float, budget: int) -> int:
        """Of a batch's `budget`."""
        return min(budget, self._positions) if now < self._until else budget


def is_long(work: Work) -> bool:
    """Whether more than a step of it is left. A transfer would wait for ever behind steps if it came after them."""
    if work.transfer is not None:
        return False
    if work.queries is not None and work.queries > 1:
        return True
    return any(new - done > 1 for new, done in zip(work.new, work.done, strict=True))
