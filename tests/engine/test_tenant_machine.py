"""Random lives of several tenants' sessions: who is refused, who expires and who is evicted is told beforehand by a
plain model in memory, which knows blocks as names and counts by looking at all of them."""

from dataclasses import dataclass
from itertools import count

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.batch import Append, Truncate
from engine.config import EngineConfig, Quota
from engine.engine import Engine
from engine.errors import (
    EngineError,
    LengthExceeded,
    ModelFailed,
    PoolExhausted,
    QuotaExceeded,
    Refused,
    SessionGone,
    SessionNotFound,
)
from tests.fakes import DECODER, VOCAB, FakeClock, FakeRunner

POISON = VOCAB - 1
BLOCKS = 20
SIZE = 4
WAIT = 5.0
REMEMBERED = 40.0
TENANTS = ("a", "b", "g")
COMMON = Quota(pinned=2)
OWN = {
    "b": Quota(sessions=3, blocks=9, pinned=1, positions_per_minute=120),
    "g": Quota(guaranteed_blocks=6, blocks=12),
}
picks = st.integers(0, 10**6)


def quota(tenant: str) -> Quota:
    return OWN.get(tenant, COMMON)


@dataclass
class Told:
    tenant: str
    ttl: float | None
    pinned: bool
    used_at: float
    length: int = 0
    blocks: tuple[int, ...] = ()  # names that nobody else knows
    labels: tuple[tuple[str, str], ...] = ()

    def expired(self, now: float) -> bool:
        return self.ttl is not None and not self.pinned and self.used_at + self.ttl <= now


class Tenants(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.told: dict[str, Told] = {}
        self.gone: dict[str, tuple[str, str, float]] = {}  # tenant, reason, when
        self.owed = dict.fromkeys(TENANTS, 0.0)
        self.names = count()

    @initialize(evict=st.sampled_from(["none", "lru", "lru"]), zero=st.booleans())
    def start(self, evict: str, zero: bool) -> None:
        self.evict = evict == "lru"
        self.runner = FakeRunner(DECODER, blocks=BLOCKS + 1, block_size=SIZE)
        self.runner.poison = POISON
        config = EngineConfig(
            block_size=SIZE,
            token_budget=8,
            wait_seconds=WAIT,
            tombstone_seconds=REMEMBERED,
            quota=COMMON,
            quotas=OWN,
            evict="lru" if self.evict else "none",
            zero_freed=zero,
        )
        self.engine = Engine([self.runner], config, self.clock)

    # The model

    def used(self, tenant: str) -> int:
        return len({block for told in self.told.values() if told.tenant == tenant for block in told.blocks})

    def available(self, tenant: str) -> int:
        free = BLOCKS - sum(self.used(each) for each in TENANTS)
        kept = sum(max(0, quota(each).guaranteed_blocks - self.used(each)) for each in TENANTS if each != tenant)
        most = quota(tenant).blocks
        return min(free - kept, BLOCKS if most is None else most - self.used(tenant))

    def most(self, tenant: str) -> int:
        others = sum(quota(each).guaranteed_blocks for each in TENANTS if each != tenant)
        return min(BLOCKS - others, quota(tenant).blocks or BLOCKS)

    def needed(self, told: Told, n: int) -> int:
        grow = -(-(told.length + n) // SIZE) - len(told.blocks)
        shared = told.length % SIZE and sum(told.blocks[-1] in other.blocks for other in self.told.values()) > 1
        return grow + bool(shared)

    def put(self, told: Told, n: int) -> None:
        new = self.needed(told, n)
        grow = -(-(told.length + n) // SIZE) - len(told.blocks)
        blocks = told.blocks if new == grow else told.blocks[:-1]
        told.blocks = blocks + tuple(next(self.names) for _ in range(new))
        told.length += n

    def close(self, session: str, reason: str) -> None:
        told = self.told.pop(session)
        self.gone[session] = told.tenant, reason, self.clock.now

    def expire(self) -> None:
        for session, told in list(self.told.items()):
            if told.expired(self.clock.now):
                self.close(session, "expired")

    def make_room(self, tenant: str, needed: int, busy: str) -> bool:
        """Closes what may go, in its order, until it is enough; nothing when it would not be."""
        before = dict(self.told)
        order = sorted(
            (session for session, told in self.told.items() if session != busy and not told.pinned),
            key=lambda session: (self.told[session].tenant != tenant, self.told[session].used_at),
        )
        stay = {block for session, told in before.items() if session not in order for block in told.blocks}
        chosen: list[str] = []
        for session in order:
            told = self.told[session]
            if set(told.blocks) <= stay:
                continue
            del self.told[session]
            if told.tenant != tenant and self.used(told.tenant) < quota(told.tenant).guaranteed_blocks:
                self.told[session] = told
                continue
            chosen.append(session)
            if self.available(tenant) >= needed:
                break
        else:
            self.told = before
            return False
        left = {block for told in self.told.values() for block in told.blocks}
        self.told = before
        for session in chosen:
            if not set(self.told[session].blocks) <= left:
                self.close(session, "evicted")
        return True

    def rate(self, tenant: str, n: int) -> float:
        """Seconds until so many positions may start."""
        per_minute = quota(tenant).positions_per_minute
        if per_minute is None:
            return 0.0
        return max(0.0, self.owed[tenant] + min(n, per_minute) - per_minute) * 60 / per_minute

    # The engine

    def pick(self, number: int) -> tuple[str, Told]:
        while not self.told:
            self.create("a", None, False)
        session = list(self.told)[number % len(self.told)]
        return session, self.told[session]

    def run(self) -> None:
        while self.engine.run_once():
            self.engine.check()

    def later(self, seconds: float) -> None:
        self.clock.now += seconds
        for tenant in TENANTS:
            per_minute = quota(tenant).positions_per_minute or 0
            self.owed[tenant] = max(0.0, self.owed[tenant] - seconds * per_minute / 60)

    @rule(tenant=st.sampled_from(TENANTS), ttl=st.sampled_from([None, None, 3.0, 30.0]), pinned=st.booleans())
    def create(self, tenant: str, ttl: float | None, pinned: bool) -> None:
        own = [told for told in self.told.values() if told.tenant == tenant]
        limits = quota(tenant)
        full = limits.sessions is not None and len(own) >= limits.sessions
        full |= pinned and limits.pinned is not None and sum(told.pinned for told in own) >= limits.pinned
        if full:
            with pytest.raises(QuotaExceeded) as refused:
                self.engine.create_session("decoder", tenant=tenant, ttl_seconds=ttl, pinned=pinned)
            ends = [told.used_at + told.ttl for told in own if told.ttl is not None and not told.pinned]
            assert refused.value.retry_after == (max(1.0, min(ends) - self.clock.now) if ends else WAIT)
            return
        info = self.engine.create_session("decoder", tenant=tenant, ttl_seconds=ttl, pinned=pinned)
        self.told[info.id] = Told(tenant, ttl, pinned, self.clock.now)

    @rule(number=picks, n=st.sampled_from([1, 1, 1, 3, 8, 17, 30, 50]), fails=st.sampled_from([False, False, True]))
    def append(self, number: int, n: int, fails: bool) -> None:
        session, told = self.pick(number)
        tokens = np.full((1, n), 7)
        tokens[0, -1] = POISON if fails else 7
        tenant, needed, wait = told.tenant, self.needed(told, n), self.rate(told.tenant, n)
        too_long = told.length + n > self.most(tenant) * SIZE
        most = quota(tenant).blocks
        over = most is not None and self.used(tenant) + needed > most
        told.used_at = self.clock.now
        append = Append(session, {"token_ids": tokens}, tenant)
        self.engine.submit(append)
        self.run()
        if too_long or over or wait > 1e-6:
            error = append.future.exception(0)
            assert isinstance(error, LengthExceeded if too_long else QuotaExceeded)
            if not too_long and not over:
                assert isinstance(error, Refused)
                assert abs(error.retry_after - wait) < 1e-6
            return
        rated = quota(tenant).positions_per_minute is not None
        self.owed[tenant] += n * rated
        fits = self.available(tenant) >= needed
        if not fits and self.evict:
            fits = self.make_room(tenant, needed, session)
        if not fits:
            assert not append.future.done()
            self.later(WAIT)
            # what expires meanwhile may be enough; a running session does not
            used_at, told.used_at = told.used_at, self.clock.now
            self.expire()
            told.used_at = used_at
            fits = self.available(tenant) >= self.needed(told, n)  # fewer, if who shared its tail has gone
            self.run()
        if not fits:
            assert isinstance(append.future.exception(0), PoolExhausted)
            self.owed[tenant] = max(0.0, self.owed[tenant] - n * rated)
            self.expire()
            self.run()
            return
        if fails:
            assert isinstance(append.future.exception(0), ModelFailed)
            self.expire()
            self.run()
            return
        assert append.future.result(0).valid_length == [told.length + n]
        self.put(told, n)
        told.used_at = self.clock.now

    @rule(number=picks, copies=st.integers(1, 2), at=picks)
    def fork(self, number: int, copies: int, at: int) -> None:
        session, told = self.pick(number)
        own = sum(other.tenant == told.tenant for other in self.told.values())
        most = quota(told.tenant).sessions
        length = at % (told.length + 1)
        try:
            children = self.engine.fork(session, tenant=told.tenant, count=copies, at=length)
        except QuotaExceeded:
            assert most is not None
            assert own + copies > most
            return
        assert most is None or own + copies <= most
        told.used_at = self.clock.now
        for child in children:
            blocks = told.blocks[: -(-length // SIZE)]
            self.told[child.id] = Told(told.tenant, told.ttl, False, self.clock.now, length, blocks, told.labels)

    @rule(number=picks, at=picks)
    def truncate(self, number: int, at: int) -> None:
        session, told = self.pick(number)
        told.length = at % (told.length + 1)
        told.blocks = told.blocks[: -(-told.length // SIZE)]
        told.used_at = self.clock.now
        self.engine.submit(Truncate(session, told.length, told.tenant))
        self.run()

    @rule(number=picks, ttl=st.sampled_from([None, 2.0, 20.0]), pinned=st.booleans(), label=st.sampled_from("xy"))
    def update(self, number: int, ttl: float | None, pinned: bool, label: str) -> None:
        session, told = self.pick(number)
        pins = sum(other.pinned for other in self.told.values() if other.tenant == told.tenant)
        most = quota(told.tenant).pinned
        changes = dict(told.labels)
        taken = changes.pop(label, None) is not None
        if not taken:
            changes[label] = "1"
        try:
            self.engine.update_session(
                session, told.tenant, ttl_seconds=ttl, pinned=pinned, labels={label: None if taken else "1"}
            )
        except QuotaExceeded:
            assert pinned
            assert not told.pinned
            assert most is not None
            assert pins >= most
            return
        assert not pinned or told.pinned or most is None or pins < most
        told.ttl, told.pinned, told.used_at = ttl, pinned, self.clock.now
        told.labels = tuple(sorted(changes.items()))

    @rule(number=picks, running=st.booleans())
    def delete(self, number: int, running: bool) -> None:
        session, told = self.pick(number)
        if running:
            append = Append(session, {"token_ids": np.full((1, 1), 7)}, told.tenant)
            self.engine.submit(append)
            assert append.future.done() or not append.future.running()
            refused = append.future.exception(0) if append.future.done() else None
            assert refused is None or isinstance(refused, QuotaExceeded | LengthExceeded)
        receipt = self.engine.delete_session(session, told.tenant)
        self.close(session, "deleted")
        assert receipt.positions == told.length
        others = {block for other in self.told.values() for block in other.blocks}
        assert receipt.blocks_freed == len(set(told.blocks) - others)
        self.run()

    @rule(seconds=st.sampled_from([0.5, 2.0, 3.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.later(seconds)
        self.expire()
        self.run()

    @invariant()
    def everything_is_as_told(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check()
        assert self.runner.faults == []
        assert {info.id for tenant in TENANTS for info in self.engine.sessions(tenant)} == self.told.keys()
        for session, told in self.told.items():
            info = self.engine.session(session, told.tenant)
            assert (info.valid_length, info.blocks) == ([told.length], len(told.blocks))
            assert (info.pinned, info.ttl_seconds, info.labels) == (told.pinned, told.ttl, dict(told.labels))
            assert info.last_used_at == told.used_at
        for tenant in TENANTS:
            capacity = self.engine.capacity(tenant)
            own = [told for told in self.told.values() if told.tenant == tenant]
            assert (capacity.use.sessions, capacity.use.appends) == (len(own), 0)
            assert capacity.use.pinned == sum(told.pinned for told in own)
            assert abs(capacity.use.owed - self.owed[tenant]) < 1e-6
            assert (capacity.models[0].own, capacity.models[0].available) == (self.used(tenant), self.available(tenant))
        for session, (tenant, reason, when) in self.gone.items():
            error = self.refusal(session, tenant)
            if self.clock.now < when + REMEMBERED:
                assert isinstance(error, SessionGone)
                assert error.reason == reason
            else:
                assert isinstance(error, SessionNotFound)
            assert isinstance(self.refusal(session, "nobody"), SessionNotFound)

    def refusal(self, session: str, tenant: str) -> EngineError | None:
        try:
            self.engine.session(session, tenant)
        except EngineError as error:
            return error
        return None

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for session, told in self.told.items():
            self.engine.delete_session(session, told.tenant)
        self.run()
        assert self.engine.capacity().models[0].free == BLOCKS


TestTenants = Tenants.TestCase
TestTenants.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
