"""When an operation came to each stop of its life, for a caller who wants to know: it brings a Trail, and the engine
writes down what its clock said anyway.

           turn       scheduled                  computed    committed
    --------|-- queue --|-- batches, one or many --|-- commit --|
"""

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Trail:
    """Seconds of the engine's clock; None: it has not come so far. What is done at once, or was done before, has no
    turn and no batch."""

    model: str = ""
    turn: float | None = None  # the session's earlier operations had ended
    scheduled: float | None = None  # into its first batch
    computed: float | None = None  # the last of its batches had ended
    committed: float | None = None
    first_token: float | None = None  # of a generation: it was committed
    batches: int = 0

    def ran(self, model: str, turn: float, scheduled: float | None, computed: float, batches: int) -> None:
        """An append of it has ended, after so many batches; a generation has many."""
        self.model = model
        if self.turn is None:
            self.turn, self.scheduled = turn, scheduled
        if scheduled is not None:
            self.computed = computed
            self.batches += batches

    def drew(self, now: float) -> None:
        """A token is committed."""
        if self.first_token is None:
            self.first_token = now
