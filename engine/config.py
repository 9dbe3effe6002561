"""The engine's settings: frozen, checked once, passed in. Nothing here reads the environment."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant may hold and do; None: no bound of its own. Blocks are of each model's pool.

    `guaranteed_blocks` are the tenant's at any time: others never take what it has not used of them.
    """

    sessions: int | None = None
    pinned: int | None = 64  # of the sessions; they never expire and are never evicted
    blocks: int | None = None
    positions_per_minute: int | None = None
    concurrent_appends: int | None = None  # that run or wait
    guaranteed_blocks: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least = getattr(self, each.name), int(each.name not in ("pinned", "guaranteed_blocks"))
            if value is not None and value < least:
                raise ValueError(f"{each.name} must be at least {least}, got {value}")
        if self.blocks is not None and self.blocks < self.guaranteed_blocks:
            raise ValueError(f"blocks must be at least guaranteed_blocks, {self.guaranteed_blocks}, got {self.blocks}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of one turn of the engine and of its queues."""

    block_size: int = 16  # positions a block; 16 keys fill one AVX-512 register
    max_rows: int = 256  # rows of one batch
    token_budget: int = 512  # new positions of one batch; a longer causal append runs in chunks of at most this
    guard_positions: int = 16  # of a batch, that others have while a tenant with guaranteed blocks is at work
    max_waiting: int = 4096  # appends waiting in the engine
    max_waiting_per_session: int = 16
    gather_share: float = 0.0  # of a batch's time that the next may wait for those who stepped in it
    wait_seconds: float = 30.0  # an append that got no blocks by then is refused
    max_sessions: int = 65536
    tombstones: int = 65536  # gone sessions that still answer 410
    tombstone_seconds: float = 3600.0  # for so long
    event_ring: int = 4096  # events of each tenant that can still be told
    evict: Literal["none", "lru"] = "none"  # idle, unpinned sessions when blocks are short
    zero_freed: bool = True  # a freed block is zeroed before it is handed out again
    zero_bytes: int = 32 << 20  # that one turn zeroes at most, and at least one block
    max_past_bytes: int = 1 << 30  # of one exported past
    replay_keys: int = 64  # requests of a session that are known again by their keys
    replay_bytes_per_session: int = 16 << 20  # of their replies, which are given again
    replay_bytes: int = 256 << 20  # of all sessions' replies
    prefixes: int = (
        256  # pasts of each model that are kept, while nobody wants their blocks, when their sessions are gone
    )
    quota: Quota = Quota()  # of a tenant that has none of its own in `quotas`
    quotas: Mapping[str, Quota] = field(default_factory=dict)

    def quota_of(self, tenant: str) -> Quota:
        return self.quotas.get(tenant, self.quota)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) in (int, float) and value <= 0 and each.name != "gather_share":
                raise ValueError(f"{each.name} must be positive, got {value}")
        if self.quota.guaranteed_blocks:
            raise ValueError("quota must guarantee no blocks: a guarantee is for tenants by name, in quotas")
