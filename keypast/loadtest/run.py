"""The parent of a run: starts workers, adds up what they record, looks at the service's memory meanwhile."""

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from keypast.loadtest.check import Checked
from keypast.loadtest.connection import Address, Connection, Failed
from keypast.loadtest.plan import Plan
from keypast.loadtest.record import Record, Snapshot

LEAD = 0.1  # seconds from telling workers to their start
LINE = 1 << 26  # bytes of a worker's line


class LoadError(Exception):
    """The run could not be done; the text says why."""


@dataclass
class Run:
    """A run, while it goes on and afterwards. `memory`: (seconds, blocks used, shared and in all) of each pool, by its
    model; `busy` is each worker's share of a core."""

    plan: Plan
    began: datetime
    start: float
    record: Record = field(default_factory=Record)
    active: dict[int, int] = field(default_factory=dict)
    memory: dict[str, list[tuple[float, int, int, int]]] = field(default_factory=dict)
    busy: list[float] = field(default_factory=list)
    checked: Checked | None = None
    elapsed: float = 0.0
    stopped: bool = False

    @property
    def now(self) -> float:
        return time.monotonic() - self.start


Watch = Callable[[Run], None]


class Worker:
    """One worker's process."""

    def __init__(self, process: Process, number: int) -> None:
        self._process = process
        self.number = number

    @classmethod
    async def start(cls, plan: Plan, number: int) -> "Worker":
        """It is ready to begin. Raises LoadError."""
        command = [sys.executable, "-m", "keypast.loadtest.worker"]
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=LINE)
        worker = cls(process, number)
        worker.tell(plan.model_copy(update={"worker": number}).model_dump(mode="json"))
        await worker.hear()
        return worker

    def tell(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    async def hear(self) -> dict[str, Any]:
        """Raises LoadError."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            code = await self._process.wait()
            raise LoadError(f"worker {self.number} ended with code {code}; what it printed is above")
        told: dict[str, Any] = json.loads(line)
        return told

    async def end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def run(plan: Plan, watch: Watch | None = None, stop: asyncio.Event | None = None) -> Run:
    """All of a plan; `watch` is shown it four times a second. `stop` ends it early. Raises LoadError."""
    stop = stop or asyncio.Event()
    workers: list[Worker] = []
    try:
        started = await asyncio.gather(
            *(Worker.start(plan, number) for number in range(plan.workers)), return_exceptions=True
        )
        workers = [each for each in started if isinstance(each, Worker)]
        for each in started:
            if isinstance(each, BaseException):
                raise each
        found = Run(plan, datetime.now(UTC), time.monotonic() + LEAD)
        for worker in workers:
            worker.tell({"start": found.start})
        await _until_done(found, workers, watch, stop)
        if plan.check and not found.stopped:
            found.checked = Checked()
            for worker in workers:  # one after the other, each alone
                worker.tell({"check": True})
                found.checked.add(Checked.model_validate((await worker.hear())["checked"]))
    finally:
        for worker in workers:
            await worker.end()
    return found


async def _until_done(found: Run, workers: list[Worker], watch: Watch | None, stop: asyncio.Event) -> None:
    async def listen(worker: Worker) -> None:
        while True:
            told = await worker.hear()
            if "done" in told:
                found.busy.append(round(told["busy"], 3))
                return
            snapshot = Snapshot.model_validate(told)
            found.record.add(snapshot)
            found.active[worker.number] = snapshot.active

    async def stopping() -> None:
        await stop.wait()
        found.stopped = True
        for worker in workers:
            worker.tell({"stop": True})

    beside = [asyncio.create_task(stopping())]
    if found.plan.target == "keypast":
        beside.append(asyncio.create_task(look_at_memory(found)))
    if watch is not None:
        beside.append(asyncio.create_task(_show(found, watch)))
    try:
        await asyncio.gather(*map(listen, workers))
        found.elapsed = found.now
    finally:
        for task in beside:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _show(found: Run, watch: Watch) -> None:
    while True:
        watch(found)
        await asyncio.sleep(0.25)


async def look_at_memory(found: Run) -> None:
    """At the service's memory; not at all if it does not tell."""
    connection = Connection(Address(found.plan.url), found.plan.headers)
    try:
        while True:
            async with asyncio.timeout(10):
                reply = await connection.request("GET", "/v1/capacity")
            if reply.status == 200:
                for pool in json.loads(reply.body)["pools"]:
                    blocks = pool["blocks"]
                    point = (round(found.now, 3), blocks["used"], blocks["shared"], blocks["total"])
                    found.memory.setdefault(pool["model"], []).append(point)
            await asyncio.sleep(found.plan.interval)
    except (Failed, TimeoutError, ValueError, KeyError, TypeError):
        return
    finally:
        await connection.close()


@contextmanager
def interruptible(stop: asyncio.Event) -> Iterator[None]:
    """Ctrl-C sets `stop`; a second one is a KeyboardInterrupt."""
    loop = asyncio.get_running_loop()
    if os.name != "posix":  # no handlers there; Ctrl-C ends the command
        yield
        return

    def stopped() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, stopped)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
