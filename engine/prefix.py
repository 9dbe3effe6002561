"""What prompts begin with: how much of a sequence of ids a past has, and the pasts that are kept for it when their
sessions are gone. No tensors."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.blocks import BlockPool


def longest_prefix(histories: Iterable[array[int]], ids: Sequence[int]) -> tuple[int | None, int]:
    """Which of the histories begins with the most of `ids`, the first of them, and with how many; None: none with any.

    One that cannot be longer than the best so far is dismissed at one look.
    """
    wanted = np.array(ids, dtype=np.int64)
    best, found = 0, None
    for index, history in enumerate(histories):
        if best == len(wanted):
            break
        if len(history) > best and history[best] == wanted[best]:
            length = _common(np.frombuffer(history, dtype=np.int64), wanted)
            if length > best:
                best, found = length, index
    return found, best


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A past without a session."""

    tenant: str
    history: array[int]
    table: array[int]


class Prefixes:
    """Those of one model, the last `most` that were used. They hold their blocks until somebody wants blocks."""

    def __init__(self, pool: BlockPool, most: int) -> None:
        self._pool = pool
        self._most = most
        self._kept: dict[Prefix, None] = {}  # the one used longest ago first

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._kept)

    def of(self, tenant: str) -> list[Prefix]:
        """The one used last first."""
        return [prefix for prefix in reversed(self._kept) if prefix.tenant == tenant]

    def keep(self, prefix: Prefix) -> None:
        """Takes over a hold on its blocks. What it begins with is not kept twice."""
        for other in self.of(prefix.tenant):
            if len(other.history) <= len(prefix.history) and prefix.history[: len(other.history)] == other.history:
                self._drop(other)
        self._kept[prefix] = None
        while len(self._kept) > self._most:
            self.drop_one()

    def use(self, prefix: Prefix) -> None:
        del self._kept[prefix]
        self._kept[prefix] = None

    def drop_one(self, tenant: str | None = None) -> bool:
        """The one used longest ago, of one tenant or of all; False: there is none."""
        oldest = next((prefix for prefix in self._kept if tenant in (None, prefix.tenant)), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def drop_from(self, block: int) -> None:
        """All that begin with this block."""
        for prefix in [each for each in self._kept if each.table[0] == block]:
            self._drop(prefix)

    def spare(self) -> tuple[Counter[str], int]:
        """Blocks a tenant that nobody else holds; and how many of all are shared, but not by two sessions."""
        held = Counter(block for prefix in self._kept for block in prefix.table)
        owners = {block: prefix.tenant for prefix in self._kept for block in prefix.table}
        sessions = {block: self._pool.holders(block) - count for block, count in held.items()}
        alone = Counter(owners[block] for block, others in sessions.items() if not others)
        return alone, sum(self._pool.is_shared(block) and others < 2 for block, others in sessions.items())

    def _drop(self, prefix: Prefix) -> None:
        del self._kept[prefix]
        self._pool.release(prefix.table)


def _common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """How many elements they begin with that are the same."""
    shorter = min(len(first), len(second))
    differs = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differs[0]) if len(differs) else shorter
