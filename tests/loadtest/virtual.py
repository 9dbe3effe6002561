"""Time that passes only when everybody waits, and a server without a socket: a run of minutes takes none, to the µs."""

import asyncio
import json
import selectors
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Self, TypeVar

from keypast.loadtest.check import Checked
from keypast.loadtest.clock import Clock
from keypast.loadtest.connection import Address, Connection, Connections, Failed, Head, Reply
from keypast.loadtest.plan import Plan
from keypast.loadtest.record import Record
from keypast.loadtest.worker import Share
from tests.loadtest.fake_server import Answer, Answering, Asked

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Where an event loop would sleep until its next timer, this one's clock jumps there."""

    def __init__(self) -> None:
        self._instant = 1000.0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        return self._instant

    def _jump(self, seconds: float) -> None:
        self._instant += seconds


class _Jumping(selectors.DefaultSelector):
    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everybody waits, and for nothing")
        self._jump(max(0.0, timeout))
        return super().select(0)


def run(act: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(act)


def now() -> float:
    return asyncio.get_running_loop().time()


class VirtualClock(Clock):
    now = staticmethod(now)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    async def until(self, instant: float) -> None:
        if instant > now():
            await asyncio.sleep(instant - now())


class FakeConnection(Connection):
    """Its replies are the answers, in no time but what they take."""

    def __init__(self, answer: Callable[[str, str, bytes], Awaitable[Answer]]) -> None:
        super().__init__(Address("http://fake"))
        self._answer = answer

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Reply:
        answer = await self._answered(method, path, body)
        return Reply(answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.body)

    async def stream(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[Head, AsyncGenerator[bytes, None]]:
        answer = await self._answered(method, path, body)
        return Head(answer.status, answer.headers), _parts(answer)

    async def _answered(self, method: str, path: str, body: bytes) -> Answer:
        answer = await self._answer(method, path, body)
        if answer.drop:
            raise Failed("broken", "dropped")
        return answer


async def _parts(answer: Answer) -> AsyncGenerator[bytes, None]:
    for seconds, chunk in answer.parts or ((0.0, answer.body),):
        await asyncio.sleep(seconds)
        yield chunk


class FakeService(Connections):
    """What a Share talks to. `asked` is what came, `together` the most requests at a time."""

    def __init__(self, answer: Answering, limit: int = 1000) -> None:
        super().__init__(Address("http://fake"), {}, limit)
        self.asked: list[Asked] = []
        self.together = 0
        self._running = 0
        self._answering = answer
        self._room = asyncio.Semaphore(limit)

    async def take(self) -> Connection:
        await self._room.acquire()
        return FakeConnection(self._one)

    def give(self, connection: Connection) -> None:
        self._room.release()

    async def _one(self, method: str, path: str, body: bytes) -> Answer:
        asked = Asked(len(self.asked), method, path, {}, body, now())
        self.asked.append(asked)
        self._running += 1
        self.together = max(self.together, self._running)
        try:
            return await self._answering(asked)
        finally:
            self._running -= 1


class Loaded:
    """What came of a share of a plan in virtual time."""

    def __init__(self, plan: Plan, answer: Answering) -> None:
        self.record = Record()
        self.checked: Checked | None = None
        self.asked: list[Asked] = []
        self.together = 0
        self.seconds = 0.0
        run(self._load(plan, answer))

    async def _load(self, plan: Plan, answer: Answering) -> None:
        began, service = now(), FakeService(answer, plan.connections)
        share = Share(plan, began, VirtualClock(), service)
        await share.run(self.record.add, asyncio.Event())
        self.seconds = now() - began
        self.checked = await share.check() if plan.check else None
        self.asked, self.together = service.asked, service.together

    def ms(self, name: str, at: str) -> float:
        value = self.record.ms(name, at)
        assert value is not None, f"no {name} was measured"
        return value

    def count(self, name: str) -> int:
        return int(self.record.totals[name].get_total_count())

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(each.body) for each in self.asked]
