"""Are outputs under load those of a client that is alone? Some visits are done again, one by one, and compared."""

import random
from collections.abc import Callable

import numpy as np
from pydantic import BaseModel

from keypast.loadtest.visits import Output, Visitor

TOLERANCE = 2e-3  # of what is at most 1, else relative: float16 sums in another order


class Checked(BaseModel):
    """Visits: `equal` to the bit, `close` (tensors within the tolerance), `different`, `failed` when done again.
    `worst` is the largest difference of a number; `first` describes the first visit that differs."""

    equal: int = 0
    close: int = 0
    different: int = 0
    failed: int = 0
    worst: float = 0.0
    first: str | None = None

    def add(self, other: "Checked") -> None:
        self.equal += other.equal
        self.close += other.close
        self.different += other.different
        self.failed += other.failed
        self.worst = max(self.worst, other.worst)
        self.first = self.first or other.first


class Kept:
    """A few of the visits, each as likely as any other, with their outputs."""

    def __init__(self, limit: int, seed: int) -> None:
        self._limit = limit
        self._drawn = random.Random(f"kept {seed}")
        self._seen = 0
        self.visits: dict[int, list[Output]] = {}

    def offer(self, index: int, outputs: list[Output]) -> None:
        self._seen += 1
        if len(self.visits) < self._limit:
            self.visits[index] = outputs
        elif self._drawn.randrange(self._seen) < self._limit:
            del self.visits[self._drawn.choice(list(self.visits))]
            self.visits[index] = outputs


async def check(kept: Kept, visitor: Visitor, now: Callable[[], float]) -> Checked:
    """`visitor` is idle; `now()` is the instant that each of its visits is due."""
    result = Checked()
    for index, outputs in kept.visits.items():
        again = await visitor.visit(index, now(), keep=True)
        if again.failed is not None:
            result.failed += 1
            result.first = result.first or f"visit {index}, alone: {again.failed}"
            continue
        difference = compare(outputs, again.outputs)
        if difference is None:
            result.different += 1
            result.first = result.first or f"visit {index}: {_told(outputs, again.outputs)}"
        else:
            result.worst = max(result.worst, difference)
            result.equal += difference == 0
            result.close += difference > 0
    return result


def compare(loaded: list[Output], alone: list[Output]) -> float | None:
    """The largest difference, 0 when all are equal to the bit; None: they are different outputs."""
    if len(loaded) != len(alone):
        return None
    worst = 0.0
    for one, other in zip(loaded, alone, strict=True):
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            if one.shape != other.shape or not np.array_equal(np.isfinite(one), np.isfinite(other)):
                return None
            difference = np.abs(one.astype(np.float64) - other) / np.maximum(1.0, np.abs(other))
            worst = max(worst, float(np.nan_to_num(difference).max(initial=0.0)))
        elif type(one) is not type(other) or one != other:
            return None
    return worst if worst <= TOLERANCE else None


def _told(loaded: list[Output], alone: list[Output]) -> str:
    for at, (one, other) in enumerate(zip(loaded, alone, strict=False)):
        if compare([one], [other]) is None:
            return f"output {at} was {str(one)[:60]}, alone it is {str(other)[:60]}"
    return f"{len(loaded)} outputs, alone {len(alone)}"
