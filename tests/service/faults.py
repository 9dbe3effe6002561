"""A service whose requests can be made to fail at a chosen stop of their life, and what its models must answer.

admit, reserve              `FaultyQuotas` (tests.fakes): a quota cannot be looked up, by the caller's
                            thread or by the engine's
prepare, forward, commit    `FaultyRunner`: raises before or after the blocks are written, or gives what no commit
                            can be made of
encode                      a tokenizer that is broken, or a token that is none
the reply                   `LossyTransport`: the service has answered, and nobody hears it
"""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import httpx
import numpy as np

from engine.batch import Array, Batch, RowResult
from engine.serving import Runner
from keypast.wire import encode_tensor
from tests.fakes import ATTENTION, DECODER, VOCAB, FakeClock, FakeRunner, next_token

Stop = Literal["admit", "reserve", "prepare", "forward", "commit", "encode"]
WIDE = 4  # channels of the attention layer


class TickingClock(FakeClock):
    """Told the time, and a little later at every look, so that what waits for blocks is soon overdue."""

    def __call__(self) -> float:
        self.now += 1e-7
        return self.now


class Unreadable:
    """What a device may leave behind: nothing can be made of it."""


class FaultyRunner:
    """`fail` the batches of a session, once so many of them have passed, at a stop; `fired` says whether one did.
    `hold` the so-manieth batch from now: `held` is set there, and it goes on with `release`."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.spec = inner.spec
        self.blocks = inner.blocks
        self.fired = False
        self.held = threading.Event()
        self._stop: Stop | None = None
        self._session = ""
        self._skip = 0
        self._hold_in = 0
        self._gate = threading.Event()
        self._gate.set()

    def fail(self, stop: Stop, session: str, skip: int = 0) -> None:
        self._stop, self._session, self._skip, self.fired = stop, session, skip, False

    def mend(self) -> None:
        self._stop = None

    def hold(self, batch: int = 1) -> None:
        self._gate.clear()
        self.held.clear()
        self._hold_in = batch

    def release(self) -> None:
        self._hold_in = 0
        self._gate.set()

    def run(self, batch: Batch) -> list[RowResult]:
        stop = self._turn({row.work.session.id for row in batch.rows})
        results = self.inner.run(batch)
        if stop == "forward":
            raise RuntimeError("the device is lost")  # what it wrote stays in the blocks
        if stop == "commit":
            return [replace(result, positions={"logits": Unreadable()}) for result in results]  # type: ignore[dict-item]
        if stop == "encode":
            return [replace(result, once={"next_token": Unreadable()}) for result in results]
        return results

    def read_past(self, tables: list[list[int]], lengths: list[int]) -> dict[str, Array]:
        stop = self._turn({self._session})
        past = self.inner.read_past(tables, lengths)
        self._transferred(stop)
        return past

    def write_past(self, tables: list[list[int]], lengths: list[int], arrays: dict[str, Array]) -> None:
        stop = self._turn({self._session})
        self.inner.write_past(tables, lengths, arrays)
        self._transferred(stop)

    def zero(self, blocks: list[int]) -> None:
        self.inner.zero(blocks)

    def _turn(self, sessions: set[str]) -> Stop | None:
        """The stop at which this call fails."""
        self._hold_in -= 1
        if self._hold_in == 0:
            self.held.set()
            assert self._gate.wait(20)
        if self._stop is None or self._session not in sessions:
            return None
        self._skip -= 1
        if self._skip >= 0:
            return None
        self.fired = True
        if self._stop == "prepare":
            raise MemoryError("no room for the plan")
        return self._stop

    def _transferred(self, stop: Stop | None) -> None:
        if stop is not None:
            raise RuntimeError("the device is lost")


class LossyTransport(httpx.AsyncBaseTransport):
    """With `losing` the service gets every request and answers it, and its reply is lost."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self.losing = False
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        losing = self.losing
        response = await self._inner.handle_async_request(request)
        if losing:
            await response.aread()
            raise httpx.ReadError("the connection is lost", request=request)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class Voice(Protocol):
    """How one model is spoken to, and what it must answer. A position is a number from 0 to `positions`."""

    name: str
    runner: FaultyRunner
    positions: int
    speaks: bool  # generates

    def append(self, rows: list[list[int]], past: list[int]) -> dict[str, Any]:
        """A body that appends as many positions to each row; `past`: the rows' lengths."""
        ...

    def ask(self, past: list[int]) -> tuple[dict[str, Any], list[list[int]], list[list[int]]]:
        """A body for a score that says whether the past is what it should be; the positions that it appends, and the
        queries that it asks, of each row."""
        ...

    def check(self, outputs: Mapping[str, Any], after: list[list[int]], queries: list[list[int]]) -> None:
        """`after`: the rows that the queries were answered at."""
        ...

    def next(self, past: list[int], token: int) -> bool:
        """Whether a generation goes on so."""
        ...


@dataclass
class Hashing:
    """A decoder whose next token is a hash of the whole past, read through the block table."""

    runner: FaultyRunner
    name: str = DECODER.name
    positions: int = VOCAB - 1
    speaks: bool = True

    def append(self, rows: list[list[int]], past: list[int]) -> dict[str, Any]:
        return {"token_ids": rows, "sample": {"temperature": 0}}

    def ask(self, past: list[int]) -> tuple[dict[str, Any], list[list[int]], list[list[int]]]:
        rows = [[5]] * len(past)
        return self.append(rows, past), rows, rows

    def check(self, outputs: Mapping[str, Any], after: list[list[int]], queries: list[list[int]]) -> None:
        expected = [next_token(row) if asked else None for row, asked in zip(after, queries, strict=True)]
        assert outputs["next_token"] == expected

    def next(self, past: list[int], token: int) -> bool:
        return token == next_token(past)


@dataclass
class Summing:
    """An attention layer that answers each query with itself and the sum of what it sees, which is all of its row."""

    runner: FaultyRunner
    name: str = ATTENTION.name
    positions: int = VOCAB - 1
    speaks: bool = False

    def append(self, rows: list[list[int]], past: list[int]) -> dict[str, Any]:
        return {name: _wide(rows) for name in ("query", "key", "value")} | self._mask(rows, past, len(rows[0]))

    def ask(self, past: list[int]) -> tuple[dict[str, Any], list[list[int]], list[list[int]]]:
        rows = [[5, 7]] * len(past)
        return {"query": _wide(rows), **self._mask(rows, past, 0)}, [[] for _ in past], rows

    def check(self, outputs: Mapping[str, Any], after: list[list[int]], queries: list[list[int]]) -> None:
        for given, row, asked in zip(_array(outputs["attn_out"]), after, queries, strict=True):
            expected = np.array([query + sum(row) for query in asked])
            np.testing.assert_array_equal(given[: len(expected)], np.repeat(expected[:, None], WIDE, 1))

    def next(self, past: list[int], token: int) -> bool:
        raise NotImplementedError("it draws nothing")

    def _mask(self, rows: list[list[int]], past: list[int], new: int) -> dict[str, Any]:
        mask = np.ones((len(rows), len(rows[0]), max(past) + new), np.float32)
        return {"attention_mask": encode_tensor(mask, "nested")}


def _wide(rows: list[list[int]]) -> dict[str, Any]:
    return encode_tensor(np.repeat(np.array(rows, np.float32)[:, :, None], WIDE, 2), "nested")


def _array(tensor: Mapping[str, Any]) -> Array:
    return np.array(tensor["data"]).reshape(tensor["shape"])


def fake_voices(blocks: int, block_size: int) -> list[Voice]:
    decoder, attention = (FaultyRunner(FakeRunner(spec, blocks, block_size)) for spec in (DECODER, ATTENTION))
    return [Hashing(decoder), Summing(attention)]


async def soon(event: threading.Event, task: asyncio.Task[Any]) -> bool:
    """Waits for the event; False: the task has ended without it."""
    while not event.is_set():
        if task.done():
            return event.is_set()
        await asyncio.sleep(0.0005)
    return True
