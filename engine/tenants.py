"""What each tenant holds and does, and what its quota says to more of it. Blocks are counted where they are: BlockPool.

Positions are a leaky bucket: what an append takes is owed, and worked off at `positions_per_minute`. An append may owe
up to a minute's worth; a longer one starts when nothing is owed. So a tenant that keeps to its rate never waits, and
one that has been quiet may take a minute's worth at once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engine.config import Quota
from engine.errors import QuotaExceeded
from engine.session import Session

_WHAT = {"sessions": "sessions", "pinned": "pinned sessions", "appends": "appends that run or wait"}
_FIX = {"sessions": "delete one", "pinned": "unpin or delete one", "appends": "wait for one to end"}


@dataclass(slots=True)
class Use:
    sessions: int = 0
    pinned: int = 0  # of the sessions
    appends: int = 0  # operations that run or wait
    owed: float = 0.0  # positions, at `at`
    at: float = 0.0


class Tenants:
    def __init__(self, default: Quota, own: Mapping[str, Quota], clock: Callable[[], float]) -> None:
        self._default = default
        self._own = own
        self._clock = clock
        self._uses: dict[str, Use] = {}

    def quota(self, tenant: str) -> Quota:
        return self._own.get(tenant, self._default)

    def use(self, tenant: str) -> Use:
        """As it is now."""
        use = self._uses.get(tenant, Use())
        return Use(use.sessions, use.pinned, use.appends, self._owed(tenant, use), self._clock())

    def admit(
        self, tenant: str, retry_after: Callable[[], float], *, sessions: int = 0, pinned: int = 0, appends: int = 0
    ) -> None:
        """Raises QuotaExceeded unless there may be so many more; counts nothing."""
        quota, use = self.quota(tenant), self._uses.get(tenant, Use())
        for name, have, more, most in (
            ("sessions", use.sessions, sessions, quota.sessions),
            ("pinned", use.pinned, pinned, quota.pinned),
            ("appends", use.appends, appends, quota.concurrent_appends),
        ):
            if more and most is not None and have + more > most:
                message = f"{have} {_WHAT[name]} and {more} more pass the quota of {most}; {_FIX[name]}"
                raise QuotaExceeded(message, retry_after())

    def add(self, tenant: str, *, sessions: int = 0, pinned: int = 0, appends: int = 0) -> None:
        """Counts so many more, or less."""
        use = self._uses.setdefault(tenant, Use())
        use.sessions += sessions
        use.pinned += pinned
        use.appends += appends
        if min(sessions, appends) < 0:
            self._forget_idle(tenant, use)

    def charge(self, tenant: str, positions: int) -> None:
        """Owes them. Raises QuotaExceeded, with the seconds until they may be owed."""
        rate = self.quota(tenant).positions_per_minute
        if rate is None or not positions:
            return
        use = self._uses.setdefault(tenant, Use())
        owed = self._owed(tenant, use)
        over = owed + min(positions, rate) - rate
        if over > 0:
            seconds = over * 60 / rate
            raise QuotaExceeded(f"{positions} more positions pass the quota of {rate} a minute", seconds)
        use.owed, use.at = owed + positions, self._clock()

    def refund(self, tenant: str, positions: int) -> None:
        """What was charged and not computed."""
        use = self._uses.get(tenant)
        if use is not None and positions:
            use.owed, use.at = max(0.0, self._owed(tenant, use) - positions), self._clock()

    def check(self, counted: Mapping[str, tuple[int, int, int]]) -> None:
        """Raises RuntimeError unless the counts are these: sessions, pinned, appends by tenant."""
        for tenant in counted.keys() | self._uses.keys():
            use = self._uses.get(tenant, Use())
            have, should = (use.sessions, use.pinned, use.appends), counted.get(tenant, (0, 0, 0))
            if have != should:
                raise RuntimeError(f"(sessions, pinned, appends) of tenant {tenant!r} is {have}, should be {should}")

    def _owed(self, tenant: str, use: Use) -> float:
        rate = self.quota(tenant).positions_per_minute
        return 0.0 if rate is None else max(0.0, use.owed - (self._clock() - use.at) * rate / 60)

    def _forget_idle(self, tenant: str, use: Use) -> None:
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
