"""The engine's thread, and the event loop's way to it.

    event loop                               engine thread
    append, generate, ...       -- submit ->  run_once, until there is nothing to run, then wait
                                <- futures --  commit
                                <- tokens ---

A reader who leaves before the work is scheduled takes it along; after that it commits. A generation whose reader leaves
ends at the token being computed, unless the reader may come back for it.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol, TypeVar

from starlette.types import Receive

from engine.batch import (
    Append,
    AppendResult,
    ExportPast,
    ExportResult,
    Generate,
    GenerateResult,
    ImportPast,
    Operation,
    TokenEvent,
    Truncate,
)
from engine.engine import Engine
from engine.errors import EngineError, EngineStopped
from engine.stats import SessionInfo

T = TypeVar("T")

WATCH_AFTER = 0.05  # seconds: whoever waits longer is watched; a step is answered sooner and spared the cost

logger = logging.getLogger("keypast.worker")


class ReaderGone(Exception):
    """The client closed the connection; there is nobody to answer."""


class Desk(Protocol):
    """What takes operations: the engine, or who has a look at them first. As Engine has it."""

    def submit(self, operation: Operation) -> None: ...

    def submit_all(self, operations: Sequence[Operation]) -> list[EngineError | None]: ...


class EngineWorker:
    """`close` is called when the engine has ended: it gives back what the models hold outside of this process."""

    def __init__(self, engine: Engine, close: Callable[[], object], desk: Desk | None = None) -> None:
        self.engine = engine
        self.desk: Desk = engine if desk is None else desk
        self._close = close
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        self._stopping = False
        self._aborting = False
        self._generations: set[Generate] = set()

    @property
    def status(self) -> Literal["ready", "draining", "down"]:
        if self._ended.is_set() or not self._thread.is_alive() or self.engine.failed:
            return "down"
        return "draining" if self._stopping else "ready"

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def refuse_new(self) -> None:
        """The beginning of `stop`."""
        self._stopping = True
        self.engine.stop()

    async def stop(self, drain_seconds: float, cancel_seconds: float) -> None:
        """Refuses new work; what runs or waits has `drain_seconds`, then generations are told to end and have
        `cancel_seconds`, then everything fails."""
        self.refuse_new()
        if await self._ends_within(drain_seconds):
            return
        for operation in self._generations:
            operation.cancelled = True
        if not await self._ends_within(cancel_seconds):
            self._aborting = True
            await self._ends_within(cancel_seconds)

    @property
    def ended(self) -> asyncio.Event:
        """Set once nothing runs any more, and never again."""
        return self._ended

    async def append(self, operation: Append, receive: Receive) -> AppendResult:
        """Raises what the engine raises, and ReaderGone."""
        self.desk.submit(operation)
        return await _answer(operation.future, receive)

    async def append_all(self, operations: Sequence[Append], receive: Receive) -> list[AppendResult | Exception]:
        """What each gave or raised; they were all there before any was scheduled. Raises ReaderGone."""
        refused = self.desk.submit_all(operations)
        asked = list(zip(operations, refused, strict=True))
        if await _all_done([operation.future for operation, error in asked if error is None], receive):
            raise ReaderGone
        return [_outcome(operation.future) if error is None else error for operation, error in asked]

    async def truncate(self, operation: Truncate, receive: Receive) -> SessionInfo:
        """Raises what the engine raises, and ReaderGone."""
        self.desk.submit(operation)
        return await _answer(operation.future, receive)

    async def export_past(self, operation: ExportPast, receive: Receive) -> ExportResult:
        """Raises what the engine raises, and ReaderGone."""
        self.desk.submit(operation)
        return await _answer(operation.future, receive)

    async def import_past(self, operation: ImportPast, receive: Receive) -> SessionInfo:
        """Raises what the engine raises, and ReaderGone."""
        await asyncio.to_thread(self.desk.submit, operation)  # which reads the past through
        return await _answer(operation.future, receive)

    async def generate(
        self,
        operation: Generate,
        render: Callable[[TokenEvent], T],
        receive: Receive,
        silence: float | None = None,
        *,
        outlives: bool = False,
    ) -> AsyncGenerator[T | GenerateResult | None]:
        """What `render` makes of each token (on the engine's thread), at last the result; None after every `silence`
        seconds without either. Closing it, as a reader who leaves does, ends the generation within one token, or, if it
        `outlives` its reader and has been scheduled, leaves it to itself.

        Raises what the engine raises, and ReaderGone.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        operation.on_token = lambda event: tell(loop, queue.put_nowait, render(event))
        operation.future.add_done_callback(lambda future: tell(loop, queue.put_nowait, future))
        operation.future.add_done_callback(lambda _: tell(loop, self._generations.discard, operation))
        self.desk.submit(operation)
        self._generations.add(operation)
        watch = asyncio.ensure_future(left(receive))
        watch.add_done_callback(queue.put_nowait)
        silences = _Silences(loop, silence, lambda: queue.put_nowait(None))
        try:
            while True:
                item = await queue.get()
                if item is watch:
                    raise ReaderGone
                if item is operation.future:
                    yield operation.future.result()
                    return
                silences.ended()
                yield item
        finally:
            silences.close()
            watch.cancel()
            operation.future.cancel()
            if not outlives:
                operation.cancelled = True

    def _drive(self) -> None:
        """The engine's thread."""
        try:
            while not (self._stopping and self.engine.idle):
                if self._aborting:
                    self.engine.abort(EngineStopped("the service stopped before its turn came"))
                elif not self.engine.run_once():
                    self.engine.wait(0.05 if self._stopping else None)
        except BaseException:
            logger.exception("the engine has failed; nothing runs any more")
            self.engine.abort(EngineStopped("the engine has failed"))
        finally:
            self._close()
            assert self._loop is not None  # start() has set it
            tell(self._loop, self._ended.set)

    async def _ends_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True


class _Silences:
    """Tells of each `seconds` in which nothing `ended` the silence. One timer for all of them: one a token costs more
    than the rest of its way."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float | None, tell: Callable[[], object]) -> None:
        self._loop = loop
        self._seconds = seconds
        self._tell = tell
        self._since = loop.time()
        self._timer = None if seconds is None else loop.call_later(seconds, self._look)

    def ended(self) -> None:
        self._since = self._loop.time()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        assert self._seconds is not None
        rest = self._since + self._seconds - self._loop.time()
        if rest <= 0:
            self._tell()
            rest = self._seconds
        self._timer = self._loop.call_later(rest, self._look)


async def _answer(future: Future[T], receive: Receive) -> T:
    """What it gives or raises; a reader who leaves before it is scheduled takes it along. Raises ReaderGone."""
    await _all_done([future], receive)
    if future.cancelled():
        raise ReaderGone
    return future.result()


async def _all_done(futures: Sequence[Future[Any]], receive: Receive) -> bool:
    """Whether the reader has left before all had ended. One who leaves takes along what is not scheduled yet; what runs
    is waited for."""
    pending = [future for future in futures if not future.done()]
    if not pending:
        return False
    loop, count = asyncio.get_running_loop(), len(pending)
    ended: asyncio.Future[None] = loop.create_future()
    watch: asyncio.Task[None] | None = None

    def one_ended() -> None:
        nonlocal count
        count -= 1
        if count == 0 and not ended.done():
            ended.set_result(None)

    def look() -> None:
        nonlocal watch
        watch = asyncio.create_task(left(receive))
        watch.add_done_callback(let_go)

    def let_go(watch: asyncio.Task[None]) -> None:
        for future in () if watch.cancelled() else pending:
            future.cancel()

    for future in pending:
        future.add_done_callback(lambda _: tell(loop, one_ended))
    late = loop.call_later(WATCH_AFTER, look)
    try:
        await ended
    finally:
        late.cancel()
        gone = watch is not None and not watch.cancel()
    return gone


def _outcome(future: Future[AppendResult]) -> AppendResult | Exception:
    try:
        return future.result()
    except Exception as error:
        return error


async def left(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *arguments: object) -> None:
    """On the loop, unless it has ended: then nobody is left to be told."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback, *arguments)
