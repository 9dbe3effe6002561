"""A process's share of a run: `python -m keypast.loadtest.worker`, driven by its parent over pipes.

    in    the Plan                              out   {"ready": ..}
    in    {"start": instant}                    out   Snapshots, one an interval; {"done": ..}
    in    {"check": true}                       out   {"checked": ..}
    in    {"stop": true}, or the pipe's end: no more visits, those that run are stopped and clean up

One JSON object a line, everywhere. The plan comes by the pipe because it may hold a key.
"""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, islice
from typing import Any

from keypast.loadtest.check import Checked, Kept, check
from keypast.loadtest.clock import Clock
from keypast.loadtest.connection import Address, Connections
from keypast.loadtest.plan import Plan
from keypast.loadtest.record import Recorder, Snapshot
from keypast.loadtest.visits import Outcome, Visitor

AFTER_FAILURE = 0.1  # seconds that a user of a closed loop waits, unless the server says
LONGEST_PAUSE = 2.0

Emit = Callable[[Snapshot], None]


class Share:
    """What one worker does of a plan that starts at that instant. `connections`: default: new ones."""

    def __init__(self, plan: Plan, start: float, clock: Clock, connections: Connections | None = None) -> None:
        self._plan = plan
        self._start = start
        self._end = start + plan.seconds
        self._clock = clock
        window = (plan.warmup, plan.seconds)
        self.recorder = Recorder(start, window, plan.interval, plan.slo)
        self._connections = connections or Connections(Address(plan.url), plan.headers, plan.connections)
        self._visitor = Visitor(plan, self._connections, self.recorder, clock)
        self._kept = Kept(plan.check, plan.seed)

    async def run(self, emit: Emit, stopped: asyncio.Event) -> None:
        """Until all is done, or stopped."""
        visits = asyncio.create_task(self._closed() if self._plan.arrival.rate is None else self._open())
        telling = asyncio.create_task(self._tell(emit))
        stop = asyncio.create_task(stopped.wait())
        await asyncio.wait([visits, stop], return_when=asyncio.FIRST_COMPLETED)
        for task in (telling, stop, visits):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        emit(self.recorder.take(self._clock.now()))

    async def check(self) -> Checked:
        """After `run`."""
        result = await check(self._kept, self._visitor, self._clock.now)
        self.recorder.take(self._clock.now())  # those were no load
        return result

    async def close(self) -> None:
        await self._connections.close()

    async def _tell(self, emit: Emit) -> None:
        for tick in count(1):
            at = self._start + tick * self._plan.interval
            await self._clock.until(at)
            emit(self.recorder.take(at - 1e-9))

    async def _open(self) -> None:
        async with asyncio.TaskGroup() as group:
            for index, at in self._arrivals():
                due = self._start + at
                if self._clock.now() < due:
                    await self._clock.until(due)
                elif index % 16 == 0:
                    await asyncio.sleep(0)  # a worker that is late still has to read replies
                group.create_task(self._visit(index, due))

    def _arrivals(self) -> Iterator[tuple[int, float]]:
        plan = self._plan
        all_of_them = enumerate(plan.arrival.times(plan.seconds, plan.seed))
        return islice(all_of_them, plan.worker, plan.count, plan.workers)

    async def _closed(self) -> None:
        users = range(self._plan.worker, self._plan.arrival.concurrency or 0, self._plan.workers)
        async with asyncio.TaskGroup() as group:
            for user in users:
                group.create_task(self._user(user))

    async def _user(self, user: int) -> None:
        """The user's visits have the numbers user, user + concurrency and so on."""
        plan, due = self._plan, self._start
        await self._clock.until(due)
        for index in count(user, plan.arrival.concurrency or 1):
            if due >= self._end or (plan.count is not None and index >= plan.count):
                return
            outcome = await self._visit(index, due)
            if outcome.cut:
                return
            due = self._clock.now()
            if outcome.failed is not None:
                wait = outcome.failed.retry_after
                due += AFTER_FAILURE if wait is None else min(wait, LONGEST_PAUSE)
                await self._clock.until(due)

    async def _visit(self, index: int, due: float) -> Outcome:
        recorder = self.recorder
        recorder.active += 1
        recorder.tick("begun", 1, due)
        try:
            outcome = await self._visitor.visit(index, due, end=self._end, keep=self._plan.check > 0)
        finally:
            recorder.active -= 1
        ending = "failed" if outcome.failed else "cut" if outcome.cut else "ended"
        recorder.tick(ending, 1, self._clock.now())
        if ending == "ended" and self._plan.check:
            self._kept.offer(index, outcome.outputs)
        return outcome


async def main() -> None:
    lines = await _lines()
    plan = Plan.model_validate_json(await lines.readline())
    say({"ready": True})
    order = json.loads(await lines.readline() or b"{}")
    if "start" not in order:
        return
    stopped = asyncio.Event()
    orders = asyncio.create_task(_orders(lines, stopped))
    with Clock() as clock:
        share = Share(plan, order["start"], clock)
        busy, began = time.process_time(), clock.now()
        await share.run(lambda snapshot: say(snapshot.model_dump()), stopped)
        say({"done": True, "busy": (time.process_time() - busy) / max(1e-9, clock.now() - began)})
        if await orders:
            say({"checked": (await share.check()).model_dump()})
        await share.close()


async def _orders(lines: asyncio.StreamReader, stopped: asyncio.Event) -> bool:
    """Whether to check; anything else is a reason to stop."""
    asked = json.loads(await lines.readline() or b"{}")
    if asked.get("check"):
        return True
    stopped.set()
    return False


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def say(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed; it takes a third of the time."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and stops this one
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())
