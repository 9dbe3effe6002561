"""Which idle sessions go when blocks are short. Decides, and closes nothing."""

from collections import Counter
from collections.abc import Iterable

from engine.blocks import BlockPool
from engine.session import Session, SessionState


def victims(sessions: Iterable[Session], pool: BlockPool, tenant: str, needed: int) -> list[Session]:
    """Sessions whose end lets the tenant take `needed` blocks, the least recently used first, its own before others';
    none when all that may go would not do. `sessions`: the model's.

    Pinned ones and those that run stay. So does what another tenant has within its guarantee, and what a quota of the
    tenant's own would not let it use.
    """
    if needed > pool.shares.left(tenant):
        return []
    idle = [each for each in sessions if each.state is SessionState.IDLE and not each.pinned]
    tables = {session: [block for sequence in session.sequences for block in sequence.block_table] for session in idle}
    named = Counter(block for table in tables.values() for block in table)
    missing = needed - pool.available(tenant)
    chosen: list[Session] = []
    gone: Counter[str] = Counter()  # blocks a tenant
    taken: Counter[int] = Counter()
    for session in sorted(idle, key=lambda each: (each.tenant != tenant, each.last_used_at)):
        if not any(named[block] == pool.holders(block) for block in tables[session]):
            continue  # whoever else holds its blocks stays
        freed = sum(taken[block] + 1 == pool.holders(block) for block in tables[session])
        left = pool.shares.used(session.tenant) - gone[session.tenant] - freed
        if session.tenant != tenant and left < pool.shares.guaranteed(session.tenant):
            continue
        chosen.append(session)
        taken.update(tables[session])
        gone[session.tenant] += freed
        missing -= freed
        if missing <= 0:
            return [each for each in chosen if any(taken[block] == pool.holders(block) for block in tables[each])]
    return []
