"""Block ids and who holds them. No tensors: the hardest bookkeeping is tested in microseconds.

A block is `block_size` consecutive positions of one sequence, all layers. Block 0 is the null block: it is never
held, padding and replayed positions are written there. A block held by more than one sequence is shared and read-only.

    clean  -- take -->  held by 1  -- share -->  held by n
      ^                     |                       |
      +---- zeroed -----  soiled  <---- release ----+       (without zeroing, release gives clean ones)
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from engine.config import EngineConfig
from engine.shares import Shares

NULL_BLOCK = 0


class BlockPool:
    """Free blocks and reference counts of one model's pool. Last freed is first reused, while it is warm in cache.

    `shares` says which tenant may have how many. With `zero` a freed block is handed out again only after `zeroed`.
    """

    def __init__(self, blocks: int, shares: Shares | None = None, *, zero: bool = False) -> None:
        if blocks < 2:
            raise ValueError(f"a pool needs the null block and at least one more, got {blocks}")
        self.blocks = blocks
        self.shares = shares or Shares(blocks - 1, EngineConfig())
        self._zero = zero
        self._clean = list(range(blocks - 1, NULL_BLOCK, -1))
        self._soiled: list[int] = []
        self._zeroing: list[int] = []
        self._holders = [0] * blocks
        self._owners = [""] * blocks  # tenants; of held blocks
        self.shared = 0  # blocks with more than one holder

    @property
    def free(self) -> int:
        """Held by nobody, zeroed or not."""
        return len(self._clean) + len(self._soiled) + len(self._zeroing)

    @property
    def used(self) -> int:
        return self.blocks - 1 - self.free

    def available(self, tenant: str) -> int:
        """How many `take` would give the tenant, once what is free is zeroed."""
        return self.shares.available(tenant, self.free)

    def can_take(self, count: int, tenant: str = "") -> bool:
        return not count or count <= min(len(self._clean), self.available(tenant))

    def take(self, count: int, tenant: str = "") -> list[int] | None:
        """`count` blocks with one holder each, or None: not now."""
        if not count:
            return []
        if not self.can_take(count, tenant):
            return None
        taken = [self._clean.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
            self._owners[block] = tenant
        self.shares.add(tenant, count)
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
                (self._soiled if self._zero else self._clean).append(block)
                self.shares.add(self._owners[block], -1)
                freed += 1
        return freed

    def shared_prefix(self, table: Sequence[int]) -> int:
        """How many of a table's first blocks are shared. None after them is: a fork shares a prefix, and a sequence
        leaves its last block first."""
        return bisect_left(table, True, key=lambda block: not self.is_shared(block))

    def holders(self, block: int) -> int:
        return self._holders[block]

    def is_shared(self, block: int) -> bool:
        return self._holders[block] > 1

    @property
    def soiled(self) -> bool:
        """Whether freed blocks wait to be zeroed."""
        return bool(self._soiled)

    def to_zero(self, most: int) -> list[int]:
        """Up to so many freed blocks, which nobody gets until `zeroed` is called."""
        self._zeroing, self._soiled[-most:] = self._soiled[-most:], []
        return list(self._zeroing)

    def zeroed(self) -> None:
        """What `to_zero` gave is zero."""
        self._clean += self._zeroing
        self._zeroing.clear()

    def check(self, tables: Iterable[tuple[str, Iterable[int]]]) -> None:
        """Raises RuntimeError unless used + free + null = total and holders equal the block tables, (tenant, table)."""
        named = [(block, tenant) for tenant, table in tables for block in table]
        held = Counter(block for block, _ in named)
        free = self._clean + self._soiled + self._zeroing
        if NULL_BLOCK in held:
            raise RuntimeError("the null block is in a block table")
        if len(set(free)) != len(free):
            raise RuntimeError("a block is free twice")
        for block in range(1, self.blocks):
            if held[block] != self._holders[block]:
                raise RuntimeError(f"block {block} has {self._holders[block]} holders, {held[block]} tables name it")
        if len(held) + self.free + 1 != self.blocks:
            raise RuntimeError(f"{len(held)} used + {self.free} free + 1 null is not {self.blocks}")
        if self.shared != sum(count > 1 for count in held.values()):
            raise RuntimeError(f"{self.shared} blocks are counted as shared, the tables say otherwise")
        for block, tenant in named:
            if self._owners[block] != tenant:
                raise RuntimeError(f"block {block} belongs to {self._owners[block]!r}, a table of {tenant!r} names it")
        self.shares.check(Counter(self._owners[block] for block in held))

    def __repr__(self) -> str:
        return f"<BlockPool {self.blocks}: {self.used} used, {self.free} free, 1 null>"


def blocks_for(length: int, block_size: int) -> int:
    """How many blocks cover `length` positions."""
    return -(-length // block_size)
