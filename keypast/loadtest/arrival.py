"""When visits begin.

closed   `concurrency` users, each with one visit after another: the load gives way when the server is slow
open     at a rate that asks nobody: Poisson or fixed gaps, the rate constant or a ramp. What the server cannot take
         waits, and the waiting counts
"""

import math
import random
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from keypast.loadtest.scenario import Strict


class Rate(Strict):
    """Visits a second, from `begin` at the start to `end` at the end."""

    begin: float = Field(ge=0)
    end: float = Field(ge=0)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.begin + self.end > 0:
            raise ValueError("a rate must be above 0")
        return self


class Arrival(Strict):
    """Exactly one of `concurrency` and `rate`."""

    concurrency: int | None = Field(default=None, ge=1, le=100_000)
    rate: Rate | None = None
    gaps: Literal["poisson", "fixed"] = "poisson"

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("give exactly one of concurrency and rate")
        return self

    def times(self, seconds: float, seed: int) -> Iterator[float]:
        """Of an open loop, in seconds since the start, in order; a ramp reaches its end after `seconds`."""
        assert self.rate is not None
        drawn = random.Random(f"arrivals {seed}")
        due = 0.0  # visits that are due by then, as a number that grows with the rate
        while True:
            at = _when(due, self.rate, seconds)
            if at is None:
                return
            yield at
            due += drawn.expovariate(1.0) if self.gaps == "poisson" else 1.0

    def __str__(self) -> str:
        if self.rate is None:
            return f"{self.concurrency} at a time"
        begin, end = self.rate.begin, self.rate.end
        return f"{begin:g} a second, {self.gaps}" if begin == end else f"{begin:g} to {end:g} a second, {self.gaps}"


def _when(due: float, rate: Rate, seconds: float) -> float | None:
    """The t at which the rate's integral from 0 is `due`; None: never before `seconds`."""
    growth = (rate.end - rate.begin) / seconds
    if rate.begin == rate.end:
        at = due / rate.begin
    elif (root := rate.begin**2 + 2 * growth * due) >= 0:
        at = 2 * due / (rate.begin + math.sqrt(root)) if due else 0.0
    else:
        return None
    return at if at < seconds else None
