"""What sessions promise, in numbers: forks, truncates and memory that cost what they must, and a guarantee that holds.

    fork        of a session of 2,000 positions, against prefilling them again; blocks of 8 forks, against copies
    truncate    by one position at 4,000 of them, against at 64: it must not depend on what is kept
    waste       positions that 256 sessions of 64 to 2,048 have memory for, against those that they hold
    guarantee   p99 of the steps of a tenant within its guarantee, while another with 63 connections and four times
                the sessions that fit does what it can, against p99 when it is alone

Forks and the guarantee over HTTP, the others (the guarantee once more) in process, where HTTP hides nothing. Bounds:
the other side.

    python -m benchmarks.contract [--rounds 5] [--seconds 20] [--save]
"""

import argparse
import asyncio
import json
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from itertools import count
from queue import Queue
from typing import Any, Self

import numpy as np

from benchmarks.peers.compare import HEADER, Pairs, interleave, median_ms, report
from benchmarks.peers.flood import CONNECTIONS, STEP
from benchmarks.peers.http import Connection
from benchmarks.peers.ours import OurEngine, run
from benchmarks.peers.servers import Keypast, prompt
from engine.batch import Append, Sample, Truncate, Want
from engine.config import EngineConfig, Quota
from engine.errors import EngineError
from keypast.keys import new_key

FORKED, FORKS = 2000, 8
KEPT, FEW, TRUNCATES = 4000, 64, 40
HELD, SHORTEST, LONGEST = 256, 64, 2048
CONTEXT, FLOOD_BLOCKS = 256, 400


class Forked:
    """A session of 2,000 positions, and what is done to it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._path = ""

    async def open(self) -> None:
        self._path = await self._prefilled()

    async def fork_ms(self) -> float:
        started = time.perf_counter()
        (child,) = await self._fork(1)
        elapsed = (time.perf_counter() - started) * 1e3
        await self._connection.call("DELETE", child)
        return elapsed

    async def again_ms(self) -> float:
        started = time.perf_counter()
        path = await self._prefilled()
        elapsed = (time.perf_counter() - started) * 1e3
        await self._connection.call("DELETE", path)
        return elapsed

    async def blocks(self, *, stepped: bool) -> tuple[float, float]:
        """(blocks used by it and its forks, blocks that they would use without sharing)."""
        children = await self._fork(FORKS)
        if stepped:
            for child in children:
                await self._connection.call("POST", f"{child}/step", STEP)
        pools = (await self._connection.call("GET", "/v1/capacity"))["pools"]
        held = [(await self._connection.call("GET", path))["blocks"] for path in (self._path, *children)]
        for child in children:
            await self._connection.call("DELETE", child)
        return pools[0]["blocks"]["used"], sum(held)

    async def _fork(self, number: int) -> list[str]:
        reply = await self._connection.call("POST", f"{self._path}/fork", {"count": number})
        return [f"/v1/sessions/{child['id']}" for child in reply["sessions"]]

    async def _prefilled(self) -> str:
        created = await self._connection.call("POST", "/v1/sessions", {"model": "model"})
        path = f"/v1/sessions/{created['id']}"
        await self._connection.call("POST", f"{path}/prefill", {"token_ids": [prompt(0, FORKED)]})
        return path


def forks(runner: asyncio.Runner, rounds: int) -> list[Pairs]:
    results = []
    with Keypast(kv_memory="1GiB") as ours:
        runner.run(ours.ready("/readyz"))
        forked = Forked(Connection(ours.port))
        runner.run(forked.open())
        pairs = Pairs(f"fork of {FORKED} positions", "prefilled again", "ms", "less", 100)
        sides = (lambda: runner.run(forked.fork_ms())), (lambda: runner.run(forked.again_ms()))
        results.append(interleave(pairs, *sides, rounds))
        for what, stepped, goal in (("", False, 1 + FORKS), (", a step each", True, None)):
            pairs = Pairs(f"{FORKS} forks of {FORKED} positions{what}", "copies", "blocks", "less", goal)
            pairs.add(*runner.run(forked.blocks(stepped=stepped)))
            print(pairs.row(), flush=True)
            results.append(pairs)
    return results


def truncates(rounds: int) -> Pairs:
    ours = OurEngine()
    parents = {length: ours.session(prompt(1, length)) for length in (KEPT, FEW)}

    def truncate_ms(length: int) -> float:
        """Median of one position after the other, on a fork."""
        child = ours.engine.fork(parents[length])[0].id
        lengths = count(length - 1, -1)

        def one() -> None:
            operation = Truncate(child, next(lengths))
            ours.engine.submit(operation)
            operation.future.result(0)

        elapsed = median_ms(one, TRUNCATES)
        ours.delete([child])
        return elapsed

    pairs = Pairs(f"truncate by 1 of {KEPT} positions", f"of {FEW}", "ms", "less", 1 / 1.5)
    return interleave(pairs, partial(truncate_ms, KEPT), partial(truncate_ms, FEW), rounds)


def waste() -> Pairs:
    """Of a layer whose keys and values are small, so that all of it fits; blocks are of 16 positions in any model."""
    engine = OurEngine("attention:hidden=16,heads=1", kv_memory=1 << 26).engine
    drawn = random.Random(0)
    held = 0
    for _ in range(HELD):
        length = drawn.randint(SHORTEST, LONGEST)
        keys = np.zeros((1, length, 16), np.float16)
        run(engine, [Append(engine.create_session("model").id, {"key": keys, "value": keys})])
        held += length
    pool = engine.capacity().models[0]
    pairs = Pairs(f"memory of {HELD} sessions", "what they hold", "slots", "less", 1 / 1.04)
    pairs.add(pool.used * pool.block_size, held)
    print(pairs.row(), flush=True)
    return pairs


def p99(times: list[float]) -> float:
    return sorted(times)[math.ceil(0.99 * len(times)) - 1]


class Guaranteed:
    """A service that two tenants use: one has a guarantee, the other all the rest."""

    def __init__(self, port: int, keys: Mapping[str, str], seconds: float) -> None:
        self._port = port
        self._keys = keys
        self._seconds = seconds

    def _connection(self, tenant: str) -> Connection:
        return Connection(self._port, {"Authorization": f"Bearer {self._keys[tenant]}"})

    async def alone(self) -> float:
        """ms, p99."""
        connection = self._connection("guaranteed")
        created = await connection.call("POST", "/v1/sessions", {"model": "model"})
        path = f"/v1/sessions/{created['id']}"
        await connection.call("POST", f"{path}/prefill", {"token_ids": [prompt(0, CONTEXT)]})
        times: list[float] = []
        until = time.perf_counter() + self._seconds
        while time.perf_counter() < until or len(times) < 100:
            started = time.perf_counter()
            await connection.call("POST", f"{path}/step", STEP)
            times.append((time.perf_counter() - started) * 1e3)
            if len(times) % 100 == 0:
                await connection.call("POST", f"{path}/truncate", {"length": CONTEXT})
        await connection.call("DELETE", path)
        await connection.close()
        return p99(times)

    async def flooded(self, longest: int) -> float:
        """The same beside appends of up to `longest` positions."""
        command = [sys.executable, "-m", "benchmarks.peers.flood", str(self._port), self._keys["flood"], str(longest)]
        flood = await asyncio.create_subprocess_exec(*command)
        await asyncio.sleep(3)
        worst = await self.alone()
        flood.terminate()
        await flood.wait()
        connection = self._connection("flood")
        while sessions := (await connection.call("GET", "/v1/sessions"))["data"]:
            for session in sessions:
                await connection.call("DELETE", f"/v1/sessions/{session['id']}")
        await connection.close()
        return worst


class Driven:
    """An engine on a thread of its own, and a thread that floods it: what the guarantee is worth without HTTP, whose
    server and clients take turns with the engine on the same cores."""

    def __init__(self, steps: int) -> None:
        kv_memory = FLOOD_BLOCKS * 360 << 10
        config = EngineConfig(quotas={"guaranteed": Quota(guaranteed_blocks=40)}, wait_seconds=0.5)
        self._engine = OurEngine(kv_memory=kv_memory, config=config).engine
        self._steps = steps
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._drive)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def _drive(self) -> None:
        while not self._ended.is_set():
            if not self._engine.run_once():
                self._engine.wait(0.05)

    def alone(self) -> float:
        """ms, p99."""
        session = self._engine.create_session("model", tenant="guaranteed").id
        self._append(session, "guaranteed", prompt(0, CONTEXT))
        times = []
        for _ in range(self._steps):
            started = time.perf_counter()
            self._append(session, "guaranteed", [7])
            times.append((time.perf_counter() - started) * 1e3)
        self._engine.delete_session(session, "guaranteed")
        return p99(times)

    def flooded(self, longest: int) -> float:
        """The same beside a tenant of 4 sessions for each of so many clients, all of which append all the time."""
        ended = threading.Event()
        flood = threading.Thread(target=self._flood, args=(longest, ended))
        flood.start()
        time.sleep(2)
        worst = self.alone()
        ended.set()
        flood.join()
        return worst

    def _append(self, session: str, tenant: str, tokens: list[int]) -> None:
        append = Append(session, {"token_ids": np.array([tokens])}, tenant, want=Want(sample=Sample()))
        self._engine.submit(append)
        append.future.result(60)

    def _flood(self, longest: int, ended: threading.Event) -> None:
        drawn = random.Random(longest)
        engine, idle = self._engine, Queue[str]()
        for _ in range(4 * CONNECTIONS):
            idle.put(engine.create_session("model", tenant="flood").id)
        while not ended.is_set():
            session = idle.get()
            if drawn.random() < 0.3:  # its blocks come free for others
                engine.delete_session(session, "flood")
                session = engine.create_session("model", tenant="flood").id
            append = Append(session, {"token_ids": np.array([prompt(0, drawn.randint(1, longest))])}, "flood")
            append.future.add_done_callback(lambda _, session=session: idle.put(session))  # type: ignore[misc]
            with suppress(EngineError):  # longer than it may become
                engine.submit(append)
                continue
            idle.put(session)
        for info in engine.sessions("flood"):
            engine.delete_session(info.id, "flood")


def guarantee_in_process(rounds: int, steps: int) -> list[Pairs]:
    results = []
    with Driven(steps) as driven:
        for longest in (32, 1000):
            pairs = Pairs(f"the same in process, appends of 1-{longest}", "alone", "ms", "less", 1 / 3)
            results.append(interleave(pairs, partial(driven.flooded, longest), driven.alone, rounds))
    return results


def guarantee(runner: asyncio.Runner, rounds: int, seconds: float) -> list[Pairs]:
    results = []
    made = {tenant: new_key(tenant) for tenant in ("guaranteed", "flood")}
    settings = {
        "kv_memory": f"{FLOOD_BLOCKS * 360}KiB",  # a block of the default model is 360 KiB
        "keys": ";".join(record.line() for _, record in made.values()),
        "quotas": json.dumps({"guaranteed": {"guaranteed_blocks": 40}}),
        "wait_seconds": "0.5",
    }
    with Keypast(**settings) as server:
        runner.run(server.ready("/readyz"))
        tenant = Guaranteed(server.port, {name: key for name, (key, _) in made.items()}, seconds)
        for longest in (32, 1000):
            pairs = Pairs(f"p99 of a step beside appends of 1-{longest}", "alone", "ms", "less", 1 / 3)
            sides = partial(_run, runner, partial(tenant.flooded, longest)), partial(_run, runner, tenant.alone)
            results.append(interleave(pairs, *sides, rounds))
    return results


def _run(runner: asyncio.Runner, act: Callable[[], Coroutine[Any, Any, float]]) -> float:
    return runner.run(act())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    print(HEADER)
    with asyncio.Runner() as runner:
        results = [*forks(runner, options.rounds), truncates(options.rounds), waste()]
        results += guarantee(runner, options.rounds, options.seconds)
        results += guarantee_in_process(options.rounds, int(20 * options.seconds))
    report("contract", results, {}, options.save)


if __name__ == "__main__":
    main()
