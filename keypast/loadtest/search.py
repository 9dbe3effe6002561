"""The highest rate that holds: doubled until it does not, then halved between, to one part in twenty."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

PRECISION = 1.05
HIGHEST = 1e6
LOWEST = 1e-3


@dataclass(frozen=True)
class Trial:
    rate: float
    holds: bool


async def find_max(
    first: float, holds: Callable[[float], Awaitable[bool]], precision: float = PRECISION
) -> tuple[float | None, list[Trial]]:
    """(the highest rate that held, every trial in order); None: none did. `precision`: as a ratio of two rates."""
    trials: list[Trial] = []

    async def held(rate: float) -> bool:
        trials.append(Trial(rate, await holds(rate)))
        return trials[-1].holds

    low, high = 0.0, first
    while high < HIGHEST and await held(high):
        low, high = high, high * 2
    while low == 0 and high > LOWEST:  # even the first was too much
        if await held(high / 2):
            low = high / 2
        else:
            high /= 2
    while low and high / low > precision:
        middle = round((low * high) ** 0.5, 4)
        if await held(middle):
            low = middle
        else:
            high = middle
    return low or None, trials
