"""One visit's calls: when each was due, was sent, had its tokens, ended; and what went wrong, as a class to count."""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from keypast._stream import EventParser
from keypast.loadtest.clock import Clock
from keypast.loadtest.connection import Connection, Connections, Failed, Reply
from keypast.loadtest.record import Recorder, Sample
from keypast.wire import JSON_TYPE

_CLASS = re.compile(r"[A-Za-z0-9_.-]{1,48}")
JSON_HEADERS = {"Content-Type": JSON_TYPE}


class Over(Failed):
    """The run's time is over; nothing is wrong."""

    def __init__(self) -> None:
        super().__init__("over", "the run is over")


class Caller:
    """`due`: when the next operation is, an instant; the end of the last one, unless it is set or thought about. From
    `end` on there is none."""

    def __init__(
        self,
        connections: Connections,
        recorder: Recorder,
        clock: Clock,
        *,
        due: float,
        end: float = math.inf,
        timeout: float,
    ) -> None:
        self.connections = connections
        self.recorder = recorder
        self.clock = clock
        self.due = due
        self.end = end
        self.timeout = timeout

    def operation(self, name: str) -> "Operation":
        """Raises Over."""
        if self.due >= self.end:
            raise Over
        return Operation(self, name)

    def again(self, due: float | None = None, end: float | None = None) -> "Caller":
        """Another line of calls, from where this one is."""
        return Caller(
            self.connections,
            self.recorder,
            self.clock,
            due=self.due if due is None else due,
            end=self.end if end is None else end,
            timeout=self.timeout,
        )

    async def think(self, seconds: float) -> None:
        """Raises Over."""
        self.due += seconds
        if self.due >= self.end:
            raise Over
        await self.clock.until(self.due)


class Operation:
    """What one user waits for: a request, or some. `async with` records it; what fails is raised as Failed."""

    def __init__(self, caller: Caller, name: str) -> None:
        self._caller = caller
        self._sample = Sample(name, caller.due)
        self._timeout = asyncio.timeout(caller.timeout)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        caller, sample = self._caller, self._sample
        caller.due = sample.ended = caller.clock.now()
        try:
            await self._timeout.__aexit__(kind, error, at)
        except TimeoutError:
            sample.error = "timeout"
            caller.recorder.add(sample)
            raise Failed("timeout", f"no reply to {sample.operation} in {caller.timeout:g} s") from None
        if isinstance(error, Failed):
            sample.error = error.kind
        if error is None or sample.error is not None:  # what was stopped by us is no result
            caller.recorder.add(sample)

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Reply:
        """The reply, if it is a success. Raises Failed."""
        connection = await self._begin()
        try:
            reply = await connection.request(method, path, body, headers)
        finally:
            self._caller.connections.give(connection)
        if not 200 <= reply.status < 300:
            raise refusal(reply)
        self._timings(reply.headers.get("keypast-queue-ms"), reply.headers.get("keypast-compute-ms"))
        return reply

    async def post(self, path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """JSON there and back."""
        reply = await self.request("POST", path, json.dumps(fields).encode(), JSON_HEADERS)
        return read_json(reply.body)

    async def events(self, path: str, fields: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Every event of a stream but `[DONE]`, which must come. Raises Failed, also for an event that is an error."""
        connection = await self._begin()
        try:
            head, chunks = await connection.stream("POST", path, json.dumps(fields).encode(), JSON_HEADERS)
            async with aclosing(chunks):
                if not 200 <= head.status < 300:
                    body = b"".join([chunk async for chunk in chunks])
                    raise refusal(Reply(head.status, head.headers, body))
                async for event in _events(chunks):
                    yield event
        finally:
            self._caller.connections.give(connection)

    def token(self, number: int = 1) -> None:
        """Tokens that came just now, together."""
        now = self._caller.clock.now()
        self._sample.tokens.append(now)
        self.count("output_tokens", number)

    def count(self, what: str, number: int) -> None:
        self._caller.recorder.tick(what, number, self._caller.clock.now())

    def timings(self, told: Mapping[str, Any] | None) -> None:
        """As the service's replies have them."""
        if told is not None:
            self._timings(told.get("queue_ms"), told.get("compute_ms"))

    def _timings(self, queue_ms: str | float | None, compute_ms: str | float | None) -> None:
        if queue_ms is not None and compute_ms is not None:
            self._sample.queue_ms = (self._sample.queue_ms or 0.0) + float(queue_ms)
            self._sample.compute_ms = (self._sample.compute_ms or 0.0) + float(compute_ms)

    async def _begin(self) -> Connection:
        connection = await self._caller.connections.take()
        if self._sample.sent is None:
            self._sample.sent = self._caller.clock.now()
        self.count("requests", 1)
        return connection


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    parser, done = EventParser(), False
    async for chunk in chunks:
        for data in parser.feed(chunk):
            done = done or data == "[DONE]"
            if done:
                continue
            event = read_json(data)
            if "error" in event:
                raise Failed(_code(event), f"an error in the stream: {data[:200]}")
            yield event
    if not done:
        raise Failed("broken", "the stream ended before [DONE]")


def read_json(text: str | bytes) -> dict[str, Any]:
    """An object. Raises Failed."""
    try:
        told = json.loads(text)
    except ValueError:
        raise Failed("protocol", f"not JSON: {text[:80]!r}") from None
    if not isinstance(told, dict):
        raise Failed("protocol", f"not an object: {text[:80]!r}")
    return told


def refusal(reply: Reply) -> Failed:
    """Its kind is the problem's code, else `http_503` and so on."""
    try:
        kind = _code(json.loads(reply.body), f"http_{reply.status}")
    except ValueError:
        kind = f"http_{reply.status}"
    wait = reply.headers.get("retry-after", "")
    return Failed(kind, f"{reply.status}: {reply.body[:300]!r}", float(wait) if wait.isdecimal() else None)


def _code(told: object, default: str = "in_stream") -> str:
    """The one of keypast's problems, or of OpenAI's errors."""
    if isinstance(told, dict):
        error = told.get("error")
        for code in (told.get("code"), error.get("code") if isinstance(error, dict) else None):
            if isinstance(code, str) and _CLASS.fullmatch(code):
                return code
    return default
