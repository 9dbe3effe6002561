"""Whether a batch waits for those who stepped in the last one, with a clock that is told the time."""

import threading
import time

import numpy as np

from engine.batch import Append, Array, Batch, ExportPast, ImportPast, RowResult
from engine.config import EngineConfig
from engine.engine import Engine
from tests.engine.houses import Decoders
from tests.fakes import FakeClock, FakeRunner

STEP = 0.016  # seconds that every batch takes


class TimedRunner(FakeRunner):
    def __init__(self, clock: FakeClock) -> None:
        super().__init__(blocks=100)
        self._clock = clock

    def run(self, batch: Batch) -> list[RowResult]:
        self._clock.now += STEP
        return super().run(batch)

    def write_past(self, tables: list[list[int]], lengths: list[int], arrays: dict[str, Array]) -> None:
        self._clock.now += STEP
        super().write_past(tables, lengths, arrays)


class Clients:
    def __init__(self, count: int, share: float = 0.5) -> None:
        self.clock = FakeClock()
        self.runner = TimedRunner(self.clock)
        self.engine = Engine([self.runner], EngineConfig(gather_share=share), self.clock)
        self.ids = [self.engine.create_session("decoder").id for _ in range(count)]
        for session in self.ids:
            self.append(session, 3)
        self.engine.run_once()
        for session in self.ids:
            self.step(session)
        self.engine.run_once()

    def append(self, session: str, n: int) -> Append:
        append = Append(session, {"token_ids": np.ones((1, n), dtype=np.int64)})
        self.engine.submit(append)
        return append

    def step(self, session: str) -> Append:
        return self.append(session, 1)

    @property
    def last_batch(self) -> int:
        return len(self.runner.batches[-1])


def test_a_batch_waits_for_all_that_stepped_in_the_last_one() -> None:
    clients = Clients(4)
    for session in clients.ids[:3]:
        clients.step(session)
        assert not clients.engine.run_once()
    clients.step(clients.ids[3])
    assert clients.engine.run_once()
    assert clients.last_batch == 4


def test_it_waits_no_longer_than_it_is_worth() -> None:
    clients = Clients(4)
    step = clients.step(clients.ids[0])
    clients.clock.now += 0.5 * STEP * 3 / 4 - 1e-6
    assert not clients.engine.run_once()
    clients.clock.now += 2e-6
    assert clients.engine.run_once()
    assert clients.last_batch == 1
    assert step.future.done()


def test_who_did_not_come_is_not_waited_for_again() -> None:
    clients = Clients(2)
    clients.step(clients.ids[0])
    clients.clock.now += STEP
    clients.engine.run_once()
    clients.step(clients.ids[0])
    assert clients.engine.run_once()


def test_a_deleted_session_is_not_waited_for() -> None:
    clients = Clients(2)
    clients.engine.delete_session(clients.ids[1])
    clients.step(clients.ids[0])
    assert clients.engine.run_once()


def test_nobody_waits_for_a_prefill_or_when_the_share_is_0() -> None:
    clients = Clients(2)
    for session in clients.ids:
        clients.append(session, 5)
    clients.engine.run_once()
    clients.step(clients.ids[0])
    assert clients.engine.run_once()

    clients = Clients(2, share=0)
    clients.step(clients.ids[0])
    assert clients.engine.run_once()


def test_waiting_ends_by_itself_and_by_the_last_who_comes() -> None:
    clients = Clients(2)
    clients.step(clients.ids[0])
    assert not clients.engine.run_once()
    clients.engine.wait()  # returns: it knows until when the step is held
    clients.step(clients.ids[1])
    clients.engine.wait()
    assert clients.engine.run_once()
    assert clients.last_batch == 2


def test_who_imported_one_position_did_not_step() -> None:
    clients = Clients(1)
    source = clients.engine.create_session("decoder").id
    clients.append(source, 1)
    export, load = ExportPast(source), clients.engine.create_session("decoder").id
    clients.engine.submit(export)
    clients.clock.now += 1
    while clients.engine.run_once():
        pass
    clients.engine.submit(ImportPast(load, export.future.result(0).past))
    assert clients.engine.run_once()
    clients.step(clients.ids[0])
    assert clients.engine.run_once(), "nobody is waited for"


def test_what_was_held_until_now_is_not_waited_for() -> None:
    """Its time comes between the turn that left it and the wait: nobody else would wake the engine."""
    house = Decoders(gather_share=1.0, wait_seconds=1e6)
    first, second = house.open(positions=4), house.open(positions=4)
    house.runner.before_run = lambda batch: house.later(1)
    house.append(first, 1)
    append = house.submit(second, 1)
    assert not house.engine.run_once()
    house.later(10)
    house.engine.wait()  # the test's own limit is the assertion
    house.run()
    assert append.future.result(0).valid_length == [5]


def test_what_is_held_wakes_an_engine_that_waits_for_nothing() -> None:
    house = Decoders(gather_share=1.0, wait_seconds=1e6)
    first, second = house.open(positions=4), house.open(positions=4)
    house.runner.before_run = lambda batch: house.later(1)
    house.append(first, 1)
    waiting = threading.Thread(target=house.engine.wait, daemon=True)
    waiting.start()
    time.sleep(0.05)  # until it waits: if it does not yet, the test proves less and does not fail
    append = house.submit(second, 1)
    waiting.join(10)
    assert not waiting.is_alive()
    house.later(10)
    house.run()
    assert append.future.result(0).valid_length == [5]
