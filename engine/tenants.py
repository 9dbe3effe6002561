"""What each tenant holds and does, and what its quota says to more of it. Blocks are counted where they are: BlockPool.

Positions are a leaky bucket: what an append takes is owed, and worked off at `positions_per_minute`. An append may owe
up to a minute's worth; a longer one starts when nothing is owed. So a tenant that keeps to its rate never waits, and
one that has been quiet may take a minute's worth at once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engine.batch import Work
from engine.config import EngineConfig
from engine.errors import QuotaExceeded
from engine.session import Session
from engine.shares import Shares
from engine.stats import Use
from engine.store import SessionStore

_WHAT = {"sessions": "sessions", "pinned": "pinned sessions", "appends": "appends that run or wait"}
_FIX = {"sessions": "delete one", "pinned": "unpin or delete one", "appends": "wait for one to end"}


@dataclass(slots=True)
class _Use:
    sessions: int = 0
    pinned: int = 0  # of the sessions
    appends: int = 0  # operations that run or wait
    owed: float = 0.0  # positions, at `at`
    at: float = 0.0


class Tenants:
    def __init__(self, config: EngineConfig, store: SessionStore, clock: Callable[[], float]) -> None:
        self.quota = config.quota_of
        self._wait_seconds = config.wait_seconds
        self._store = store
        self._clock = clock
        self._append_seconds = 0.1  # that an append takes, a moving average
        self._uses: dict[str, _Use] = {}

    def use(self, tenant: str) -> Use:
        """As it is now."""
        use = self._uses.get(tenant, _Use())
        return Use(use.sessions, use.pinned, use.appends, self._owed(tenant, use))

    def admit(self, tenant: str, *, sessions: int = 0, pinned: int = 0, appends: int = 0) -> None:
        """Raises QuotaExceeded unless there may be so many more; counts nothing."""
        quota, use = self.quota(tenant), self._uses.get(tenant, _Use())
        for name, have, more, most in (
            ("sessions", use.sessions, sessions, quota.sessions),
            ("pinned", use.pinned, pinned, quota.pinned),
            ("appends", use.appends, appends, quota.concurrent_appends),
        ):
            if more and most is not None and have + more > most:
                message = f"{have} {_WHAT[name]} and {more} more pass the quota of {most}; {_FIX[name]}"
                raise QuotaExceeded(message, self._append_seconds if appends else self._soonest(tenant))

    def add(self, tenant: str, *, sessions: int = 0, pinned: int = 0, appends: int = 0) -> None:
        """Counts so many more, or less."""
        use = self._uses.setdefault(tenant, _Use())
        use.sessions += sessions
        use.pinned += pinned
        use.appends += appends
        if min(sessions, appends) < 0:
            self._forget_idle(tenant, use)

    def took(self, seconds: float) -> None:
        """An append did, from its arrival to its end."""
        self._append_seconds += (seconds - self._append_seconds) / 8

    def admit_blocks(self, tenant: str, shares: Shares, needed: int) -> None:
        """Raises QuotaExceeded unless it may have so many more of a pool's blocks."""
        if needed > shares.left(tenant):
            message = f"{shares.used(tenant)} blocks and {needed} more pass the quota of {self.quota(tenant).blocks}"
            raise QuotaExceeded(f"{message}; delete or truncate a session", self._soonest(tenant))

    def admit_positions(self, tenant: str, positions: int) -> None:
        """Raises QuotaExceeded, with the seconds until so many may be owed; owes nothing."""
        rate = self.quota(tenant).positions_per_minute
        if rate is None or not positions:
            return
        over = self._owed(tenant, self._uses.get(tenant, _Use())) + min(positions, rate) - rate
        if over > 1e-6:  # not a rounding: who comes back when told to is let in
            message = f"{positions} more positions pass the quota of {rate} a minute"
            raise QuotaExceeded(message, over * 60 / rate)

    def never_ran(self, work: Work) -> None:
        """What it owed is not owed any more, unless some of it was computed."""
        if work.started_at is None:
            self.owe(work.session.tenant, -work.size)

    def owe(self, tenant: str, positions: int) -> None:
        """So many more, or less."""
        if positions and self.quota(tenant).positions_per_minute is not None:
            use = self._uses.setdefault(tenant, _Use())
            use.owed, use.at = max(0.0, self._owed(tenant, use) + positions), self._clock()

    def check(self, counted: Mapping[str, tuple[int, int, int]]) -> None:
        """Raises RuntimeError unless the counts are these: sessions, pinned, appends by tenant."""
        for tenant in counted.keys() | self._uses.keys():
            use = self._uses.get(tenant, _Use())
            have, should = (use.sessions, use.pinned, use.appends), counted.get(tenant, (0, 0, 0))
            if have != should:
                raise RuntimeError(f"(sessions, pinned, appends) of tenant {tenant!r} is {have}, should be {should}")

    def _soonest(self, tenant: str) -> float:
        """Seconds until the next of its sessions expires, if one does; else only the tenant can make room."""
        ends = [session.expires_at for session in self._store.of(tenant) if session.expires_at is not None]
        return max(1.0, min(ends) - self._clock()) if ends else self._wait_seconds

    def _owed(self, tenant: str, use: _Use) -> float:
        rate = self.quota(tenant).positions_per_minute
        return 0.0 if rate is None else max(0.0, use.owed - (self._clock() - use.at) * rate / 60)

    def _forget_idle(self, tenant: str, use: _Use) -> None:
        """So that tenants who have left take no memory."""
        if not (use.sessions or use.appends or self._owed(tenant, use)):
            del self._uses[tenant]


def counts_by_tenant(sessions: Iterable[Session]) -> dict[str, tuple[int, int, int]]:
    """For `Tenants.check`, counted anew."""
    counted: dict[str, tuple[int, int, int]] = {}
    for session in sessions:
        total, pinned, appends = counted.get(session.tenant, (0, 0, 0))
        counted[session.tenant] = (total + 1, pinned + session.pinned, appends + len(session.waiting))
    return counted
