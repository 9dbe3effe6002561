"""Frozen snapshots of what the engine holds: safe to read on any thread, fit to be shown."""

from dataclasses import dataclass

from engine.config import Quota


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """`bytes` and `blocks` count every block of its tables, `shared_blocks` those that others hold too. Times are
    seconds since the epoch."""

    id: str
    tenant: str
    model: str
    kind: str
    state: str
    valid_length: list[int]
    max_length: int
    version: int
    blocks: int
    shared_blocks: int
    bytes: int
    parent: str | None
    labels: dict[str, str]
    ttl_seconds: float | None
    pinned: bool
    created_at: float
    last_used_at: float
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a deletion gave back. `bytes` are those of the blocks that came free."""

    id: str
    positions: int
    bytes: int
    blocks_freed: int
    blocks_still_shared: int


@dataclass(frozen=True, slots=True)
class ModelCapacity:
    """Blocks of one model's pool; total = free + used. `reserved` (part of used) belongs to appends that run now.
    `own` are those of the tenant who asks, `available` how many more it may take now."""

    model: str
    block_size: int
    block_bytes: int
    total: int
    free: int
    used: int
    shared: int
    reserved: int
    own: int
    available: int


@dataclass(frozen=True, slots=True)
class Use:
    """`pinned`: of the sessions. `appends` run or wait. `owed`: positions that its rate has not worked off yet."""

    sessions: int = 0
    pinned: int = 0
    appends: int = 0
    owed: float = 0.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """`sessions` and `waiting` are everybody's; `quota` and `use` those of the tenant who asks."""

    models: list[ModelCapacity]
    sessions: int
    waiting: int
    quota: Quota
    use: Use
