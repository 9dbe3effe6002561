"""After any number of operations, when all is deleted, everything is as at the start: blocks, counts, memory."""

import gc
import random
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from engine.batch import Append, ExportPast, Generate, ImportPast, Operation, Sample, Truncate
from engine.config import Quota
from engine.errors import EngineError
from tests.engine.houses import Decoders

TENANTS = ("", "a", "b", "g")
POISON = 96


class Life:
    """Random operations of four tenants on one engine, most of which succeed; some are cancelled or fail."""

    def __init__(self) -> None:
        quotas = {"g": Quota(guaranteed_blocks=12), "b": Quota(blocks=10, sessions=9, concurrent_appends=4)}
        self.house = Decoders(
            blocks=40,
            quotas=quotas,
            quota=Quota(sessions=30, positions_per_minute=60_000),
            evict="lru",
            wait_seconds=2.0,
            tombstones=50,
            event_ring=32,
            max_waiting=20,
        )
        self.house.runner.poison = POISON
        self.engine = self.house.engine
        self.random = random.Random(0)
        self.sessions: list[tuple[str, str]] = []

    def run(self, operations: int) -> None:
        """Ends with nothing there, tombstones neither."""
        for number in range(operations):
            tenant = self.random.choice(TENANTS)
            own = [session for owner, session in self.sessions if owner == tenant]
            try:
                if not own or self.random.random() < 0.1:
                    self._create(tenant)
                else:
                    self._one(tenant, self.random.choice(own))
            except EngineError:
                pass  # refused; what matters is that nothing of it stays
            if number % 3 == 0:
                self.engine.run_once()
            if number % 500 == 0:
                self.engine.check()
        for tenant in TENANTS:
            for info in self.engine.sessions(tenant):
                self.engine.delete_session(info.id, tenant)
        self.sessions.clear()
        self.house.run()
        self.house.later(4000)
        self.engine.delete_session(self.engine.create_session("decoder").id)  # sweeps the other tombstones
        self.house.runner.batches.clear()
        self.house.runner.transfers.clear()
        self.house.runner.zeroed.clear()

    def _create(self, tenant: str) -> None:
        ttl, pinned = self.random.choice([None, None, 3.0, 60.0]), self.random.random() < 0.1
        rows = self.random.choice([1, 1, 2])
        info = self.engine.create_session(
            "decoder", tenant=tenant, batch_size=rows, ttl_seconds=ttl, pinned=pinned, labels={"a": "b"}
        )
        self.sessions.append((tenant, info.id))

    def _one(self, tenant: str, session: str) -> None:
        what = self.random.choice(["append"] * 6 + ["cut", "fork", "delete", "patch", "generate", "move", "later"])
        if what == "fork":
            children = self.engine.fork(session, tenant=tenant, count=self.random.randint(1, 3))
            self.sessions += [(tenant, child.id) for child in children]
        elif what == "delete":
            self.sessions.remove((tenant, session))
            self.engine.delete_session(session, tenant)
        elif what == "patch":
            self.engine.update_session(session, tenant, pinned=self.random.random() < 0.3, labels={"a": None})
        elif what == "later":
            self.house.later(self.random.random())
        else:
            operation = self._operation(what, tenant, session)
            self.engine.submit(operation)
            if self.random.random() < 0.05:
                operation.future.cancel()

    def _operation(self, what: str, tenant: str, session: str) -> Operation:
        info = self.engine.session(session, tenant)
        if what == "cut":
            lengths = [self.random.randint(0, length) for length in info.valid_length]
            return Truncate(session, lengths, tenant)
        if what == "generate":
            return Generate(session, self.random.randint(1, 4), tenant, sample=Sample())
        if what == "move":
            export = ExportPast(session, tenant)
            self.engine.submit(export)
            self.house.run()
            while not export.future.done():
                self.house.later(2)  # what it waits behind has had its time
                self.house.run()
            return ImportPast(session, export.future.result(0).past, tenant)
        n = self.random.choice([1, 1, 2, 5, 13])
        tokens = np.array([[self.random.randrange(POISON + (self.random.random() < 0.1)) for _ in range(n)]])
        keep = self.random.random() > 0.1
        return Append(session, {"token_ids": np.repeat(tokens, len(info.valid_length), axis=0)}, tenant, keep=keep)


@pytest.fixture
def memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("operations", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("memory")
def test_nothing_is_left_of_many_operations(operations: int) -> None:
    life = Life()
    life.run(2_000)  # caches and rings have their size
    gc.collect()
    capacity, before = life.engine.capacity(), tracemalloc.get_traced_memory()[0]
    life.run(operations)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    life.house.check()
    after = life.engine.capacity()
    assert (after.models, after.sessions, after.waiting) == (capacity.models, 0, 0)
    assert after.models[0].free == 40
    assert grown < 64 << 10, f"{grown} bytes more after {operations} operations"
