"""What the tester itself can do: requests a second to a server in another process that does nothing.

`python -m keypast.loadtest.ceiling` is that server; it says its port on the first line and ends with its input.
"""

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from keypast.loadtest.arrival import Arrival
from keypast.loadtest.plan import ModelInfo, Plan
from keypast.loadtest.report import Report, report
from keypast.loadtest.run import run
from keypast.loadtest.scenario import Scenario
from keypast.loadtest.worker import loop_factory

CONNECTIONS = (1, 16, 64, 256)
_REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
_SCENARIO = Scenario.model_validate({"name": "ceiling", "visits": [{"kind": "request", "path": "/"}]})


class Trivial(asyncio.Protocol):
    """Answers every request head; bodies are not expected."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *heads, self._rest = (self._rest + data).split(b"\r\n\r\n")
        self._transport.write(_REPLY * len(heads))


async def ceiling(
    numbers: Sequence[int], workers: int, seconds: float, told: Callable[[int, Report], None]
) -> list[dict[str, Any]]:
    """Of each number of connections: requests a second, latencies in ms, the workers' shares of a core, and the µs of
    CPU that a request cost them."""
    found = []
    async with trivial_server() as url:
        for connections in numbers:
            plan = Plan(
                target="openai",
                url=url,
                scenario=_SCENARIO,
                models=[ModelInfo.named("")],
                arrival=Arrival(concurrency=connections),
                seconds=seconds + 0.5,
                warmup=0.5,
                workers=min(workers, connections),
            )
            result = report(await run(plan))
            told(connections, result)
            latency = {at: result.measures["request"][at] for at in ("p50", "p99")}
            figures = {"requests_per_second": result.rates["requests"], **latency, "busy": result.busy}
            found.append({"connections": connections, "workers": plan.workers, "cpu_us": cpu_us(result), **figures})
    return found


def cpu_us(result: Report) -> float:
    """Of the workers, for each request: what does not depend on what else the machine does."""
    return round(1e6 * sum(result.busy) / max(1e-9, result.counts["requests"] / result.window), 1)


@asynccontextmanager
async def trivial_server() -> AsyncIterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "keypast.loadtest.ceiling"]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}"
    finally:
        process.stdin.close()
        await process.wait()


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Trivial, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    ended = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(ended), sys.stdin)
    await ended.read()
    server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())
