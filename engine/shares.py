"""Of one pool's blocks, what each tenant has and may have. A block belongs to one tenant: forks stay with their owner.

A guarantee is kept by never letting others come near it: what all tenants together have not used of theirs stays free.

    total   | used by a | used by b | free to anyone | guaranteed to a, not used | guaranteed to c, not used |
"""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from engine.config import EngineConfig


class Shares:
    """Raises ValueError when more than the total is guaranteed."""

    def __init__(self, total: int, config: EngineConfig) -> None:
        self._total = total
        self._quota = config.quota_of
        quotas = config.quotas.items()
        self._guaranteed = {tenant: own.guaranteed_blocks for tenant, own in quotas if own.guaranteed_blocks}
        self._used: Counter[str] = Counter()
        if sum(self._guaranteed.values()) > total:
            raise ValueError(f"{sum(self._guaranteed.values())} blocks are guaranteed, the pool has {total}")

    def add(self, tenant: str, blocks: int) -> None:
        """It uses so many more, or less."""
        self._used[tenant] += blocks
        if not self._used[tenant]:
            del self._used[tenant]

    def used(self, tenant: str) -> int:
        return self._used[tenant]

    def guaranteed(self, tenant: str) -> int:
        return self._guaranteed.get(tenant, 0)

    def available(self, tenant: str, free: int, spare: Mapping[str, int] = MappingProxyType({})) -> int:
        """How many of the free ones it may take now. `spare`: used ones a tenant that are given back when wanted."""
        kept = sum(
            max(0, most - self._used[other] + spare.get(other, 0))
            for other, most in self._guaranteed.items()
            if other != tenant
        )
        return max(0, min(free + sum(spare.values()) - kept, self.left(tenant) + spare.get(tenant, 0)))

    def left(self, tenant: str) -> int:
        """How many more its own quota allows, whatever is free."""
        quota = self._quota(tenant).blocks
        return self._total if quota is None else max(0, quota - self._used[tenant])

    def most(self, tenant: str) -> int:
        """How many it may ever have."""
        others = sum(most for other, most in self._guaranteed.items() if other != tenant)
        quota = self._quota(tenant).blocks
        return self._total - others if quota is None else min(quota, self._total - others)

    def check(self, used: Mapping[str, int]) -> None:
        """Raises RuntimeError unless these are the counts."""
        if self._used != Counter(used):
            raise RuntimeError(f"blocks a tenant are counted as {dict(self._used)}, the tables say {dict(used)}")
