"""Whether to wait a moment for those who were in the last batch: their next step is on its way.

Clients that step by one request each come back some tenths of a millisecond after their replies, one after another. An
engine that takes what is there at once serves the first of them alone and the others in the next batch: everyone then
waits for two batches a step. So a batch waits until all that stepped in the last one are back, but no longer than is
worth it: `share` of the last batch's time, scaled by how many of those it could serve are missing. Who does not come is
not waited for again until it has been in a batch.
"""

from engine.batch import Batch, Work
from engine.session import Session


class Gather:
    """`share` 0 never waits."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._expected: set[Session] = set()
        self.ended = 0.0  # the last batch
        self._took = 0.0

    def ran(self, batch: Batch, started: float, ended: float) -> None:
        """Notes who may be back soon: rows that a client steps by its own requests."""
        self._expected = {work.session for work in batch.works if _is_step(work)} if self._share else set()
        self.ended, self._took = ended, ended - started

    def arrived(self, session: Session) -> None:
        """It is back, or gone: nobody waits for it."""
        self._expected.discard(session)

    def hold_until(self, queued: int, now: float) -> float | None:
        """Till when so many works should wait for more, or None: run them."""
        if not self._expected or not queued:
            return None
        missing = len(self._expected)
        until = self.ended + self._took * self._share * missing / (missing + queued)
        if now < until:
            return until
        self._expected = set()
        return None


def _is_step(work: Work) -> bool:
    return work.future is not None and work.transfer is None and max(work.new) == 1
