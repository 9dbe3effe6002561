"""What HTTP costs: one request a step, against the engine alone and against a route that does nothing.

    overhead    a step of the raw layer, binary, 1 connection: the request's time less the engine's, against
                the same number of bytes echoed by a FastAPI route, by one that hands them to another thread and back,
                and by a bare ASGI app
    steps       decoder steps a second at 16 and 64 connections, each stepping its own session, against the same engine
                in process stepping as many sessions in one batch, and against what would be left of that if each
                step also took what a request to that FastAPI route takes, as many connections asking at once

The client is the load tester's connection, in this process; server and client share the machine's cores. Bounds: the
other side.

    python -m benchmarks.http_load [--rounds 5] [--seconds 3] [--save]
"""

import argparse
import asyncio
import statistics
import time
from contextlib import ExitStack
from functools import partial
from typing import Self

import numpy as np

from benchmarks.peers.compare import HEADER, Pairs, interleave, report
from benchmarks.peers.http import Connection
from benchmarks.peers.ours import OurEngine
from benchmarks.peers.servers import Keypast, Trivial, prompt
from keypast.loadtest.connection import Address
from keypast.loadtest.connection import Connection as Raw
from keypast.wire import dump_tensors

GOALS = {"fastapi_app": 1.5, "handing_app": None, "bare_app": None}  # how many times as long ours may take
HIDDEN, CONTEXT, CALLS = 512, 256, 400
CONNECTIONS = (16, 64)
STEP = b'{"token_ids":[[7]],"sample":{"temperature":0}}'


class Repeated:
    """One request again and again over one keep-alive connection."""

    def __init__(self, port: int, path: str, body: bytes, content_type: str) -> None:
        self._connection = Raw(Address(f"http://127.0.0.1:{port}"), {"Content-Type": content_type})
        self._path, self._body = path, body

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._connection.close()

    async def call(self) -> dict[str, str]:
        """The reply's headers."""
        reply = await self._connection.request("POST", self._path, self._body)
        assert reply.status == 200, reply
        return reply.headers


async def open_session(port: int, model: str) -> tuple[Connection, str]:
    connection = Connection(port)
    created = await connection.call("POST", "/v1/sessions", {"model": model})
    return connection, f"/v1/sessions/{created['id']}"


async def layer_overhead_ms(port: int) -> float:
    """Median over steps of the raw layer, as safetensors, of what the engine did not take."""
    connection, session = await open_session(port, "layer")
    body = dump_tensors({name: np.ones((1, 1, HIDDEN), np.float16) for name in ("query", "key", "value")}, {})
    one = {"dtype": "float16", "shape": [1, 1, HIDDEN], "data": [1.0] * HIDDEN}
    mask = {"dtype": "uint8", "shape": [1, 1, 1], "data": [1]}
    await connection.call(
        "POST", f"{session}/prefill", {"query": one, "key": one, "value": one, "attention_mask": mask}
    )
    times = []
    async with Repeated(port, f"{session}/step", body, "application/vnd.safetensors") as raw:
        for _ in range(CALLS):
            started = time.perf_counter()
            headers = await raw.call()
            elapsed = (time.perf_counter() - started) * 1e3
            times.append(elapsed - float(headers["keypast-compute-ms"]))
    await connection.call("DELETE", session)
    await connection.close()
    return statistics.median(times)


async def echo_ms(port: int, size: int) -> float:
    times = []
    async with Repeated(port, "/echo", b"x" * size, "application/octet-stream") as raw:
        for _ in range(CALLS):
            started = time.perf_counter()
            await raw.call()
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


async def asked_a_second(port: int, asks: list[tuple[str, bytes, str]], seconds: float) -> float:
    """Every connection asks for its own path with its own body, of that type, as fast as replies come."""
    until = time.perf_counter() + seconds

    async def drive(path: str, body: bytes, content_type: str) -> int:
        done = 0
        async with Repeated(port, path, body, content_type) as raw:
            while time.perf_counter() < until:
                await raw.call()
                done += 1
        return done

    started = time.perf_counter()
    done = sum(await asyncio.gather(*(drive(*ask) for ask in asks)))
    return done / (time.perf_counter() - started)


async def steps_a_second(port: int, connections: int, seconds: float) -> float:
    """Of as many sessions."""
    sessions = []
    for index in range(connections):
        connection, session = await open_session(port, "model")
        await connection.call("POST", f"{session}/prefill", {"token_ids": [prompt(index, CONTEXT)]})
        await connection.close()
        sessions.append(session)
    rate = await asked_a_second(port, [(f"{session}/step", STEP, "application/json") for session in sessions], seconds)
    connection = Connection(port)
    for session in sessions:
        await connection.call("DELETE", session)
    await connection.close()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    engine = OurEngine()
    results: list[Pairs] = []
    print(HEADER)
    models = f"model=default layer=attention:hidden={HIDDEN},heads=8"
    with asyncio.Runner() as runner, Keypast(models=models) as ours, ExitStack() as stack:
        runner.run(ours.ready("/readyz"))
        ports = {}
        for app in GOALS:
            peer = stack.enter_context(Trivial(app))
            runner.run(peer.ready("/openapi.json"))
            ports[app] = peer.port
        for app, goal in GOALS.items():
            pairs = Pairs("step of the raw layer less its engine time", app, "ms", "less", goal and 1 / goal)
            sides = (
                lambda: runner.run(layer_overhead_ms(ours.port)),
                partial(lambda p: runner.run(echo_ms(p, 3 * 2 * HIDDEN)), ports[app]),
            )
            results.append(interleave(pairs, *sides, options.rounds))
        for connections in CONNECTIONS:

            def steps(n: int = connections) -> float:
                return runner.run(steps_a_second(ours.port, n, options.seconds))

            def alone(n: int = connections) -> float:
                return n / engine.step_ms(n, CONTEXT) * 1e3

            def with_route(n: int = connections) -> float:
                asks = [("/echo", STEP, "application/json")] * n
                routes = runner.run(asked_a_second(ports["fastapi_app"], asks, options.seconds))
                return 1 / (1 / alone(n) + 1 / routes)

            what = f"{connections} connections, a request a step"
            results.append(
                interleave(Pairs(what, "engine alone", "steps/s", "more", 0.85), steps, alone, options.rounds)
            )
            pairs = Pairs(what, "engine and a route", "steps/s")
            results.append(interleave(pairs, steps, with_route, options.rounds))
    report("http_load", results, {}, options.save)


if __name__ == "__main__":
    main()
