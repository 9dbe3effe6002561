"""A server whose latencies are known: an asyncio server on a thread of its own, its answers given by the test."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Asked:
    """`number`: how many came before it. `arrived` is an instant of `time.monotonic`."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    arrived: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """`raw`: bytes instead of all that. `parts`: (seconds to wait before it, chunk) of a chunked body. `drop`: the
    connection is closed in place of an answer; `close`: after it."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    parts: tuple[tuple[float, bytes], ...] | None = None
    raw: bytes | None = None
    drop: bool = False
    close: bool = False


Answering = Callable[[Asked], Awaitable[Answer]]


class FakeServer:
    """`asked` are the requests in the order of their arrival."""

    def __init__(self, answer: Answering) -> None:
        self.asked: list[Asked] = []
        self.connections = 0
        self._answer = answer
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def paths(self) -> list[str]:
        return [each.path for each in self.asked]

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1000)
        self._port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stopped.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode()[:-4].split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        asked = Asked(len(self.asked), method, path, headers, body, time.monotonic())
        self.asked.append(asked)
        answer = await self._answer(asked)
        if answer.drop:
            return False
        if answer.raw is not None:
            writer.write(answer.raw)
        elif answer.parts is not None:
            await self._stream(writer, answer)
        else:
            more = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
            head = f"HTTP/1.1 {answer.status} Some Reason\r\n{more}Content-Length: {len(answer.body)}\r\n\r\n"
            writer.write(head.encode() + answer.body)
        return not answer.close

    async def _stream(self, writer: asyncio.StreamWriter, answer: Answer) -> None:
        writer.write(f"HTTP/1.1 {answer.status} OK\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for seconds, chunk in answer.parts or ():
            await asyncio.sleep(seconds)
            writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        writer.write(b"0\r\n\r\n")


def always(answer: Answer, seconds: float = 0.0) -> Answering:
    async def answering(asked: Asked) -> Answer:
        if seconds:
            await asyncio.sleep(seconds)
        return answer

    return answering


def event(told: object) -> bytes:
    return b"data: " + (told if isinstance(told, bytes) else json.dumps(told).encode()) + b"\n\n"
