"""Block ids and who holds them. No tensors: the hardest bookkeeping is tested in microseconds.

A block is `block_size` consecutive positions of one sequence, all layers. Block 0 is the null block: it is never
held, padding and replayed positions are written there. A block held by more than one sequence is shared and read-only.
"""

from collections import Counter
from collections.abc import Iterable

NULL_BLOCK = 0


class BlockPool:
    """Free list and reference counts of one model's blocks. Last freed is first reused, while it is warm in cache."""

    def __init__(self, blocks: int) -> None:
        if blocks < 2:
            raise ValueError(f"a pool needs the null block and at least one more, got {blocks}")
        self.blocks = blocks
        self._free = list(range(blocks - 1, NULL_BLOCK, -1))
        self._holders = [0] * blocks
        self.shared = 0  # blocks with more than one holder

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.blocks - 1 - self.free

    def take(self, count: int) -> list[int] | None:
        """`count` blocks with one holder each, or None: not now."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each."""
        for block in blocks:
            if self._holders[block] == 0:
                raise RuntimeError(f"block {block} is free and cannot be shared")
            self._holders[block] += 1
            self.shared += self._holders[block] == 2

    def release(self, blocks: Iterable[int]) -> int:
        """One holder less for each; returns how many came free."""
        freed = 0
        for block in blocks:
            if self._holders[block] == 0:
                raise RuntimeError(f"block {block} is released more often than it is held")
            self._holders[block] -= 1
            self.shared -= self._holders[block] == 1
            if self._holders[block] == 0:
                self._free.append(block)
                freed += 1
        return freed

    def is_shared(self, block: int) -> bool:
        return self._holders[block] > 1

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raises RuntimeError unless used + free + null = total and holders equal the block tables given."""
        held = Counter(block for table in tables for block in table)
        if NULL_BLOCK in held:
            raise RuntimeError("the null block is in a block table")
        if len(set(self._free)) != len(self._free):
            raise RuntimeError("a block is free twice")
        for block in range(1, self.blocks):
            if held[block] != self._holders[block]:
                raise RuntimeError(f"block {block} has {self._holders[block]} holders, {held[block]} tables name it")
        if len(held) + self.free + 1 != self.blocks:
            raise RuntimeError(f"{len(held)} used + {self.free} free + 1 null is not {self.blocks}")
        if self.shared != sum(count > 1 for count in held.values()):
            raise RuntimeError(f"{self.shared} blocks are counted as shared, the tables say otherwise")

    def __repr__(self) -> str:
        return f"<BlockPool {self.blocks}: {self.used} used, {self.free} free, 1 null>"


def blocks_for(length: int, block_size: int) -> int:
    """How many blocks cover `length` positions."""
    return -(-length // block_size)
