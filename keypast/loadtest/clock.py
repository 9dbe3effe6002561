"""Waits that end on time.

An event loop rounds its timers up to a millisecond, which would be counted as the server's. So a thread of its own
waits (it wakes within some 60 µs) and tells the loop.
"""

import asyncio
import heapq
import threading
import time
from itertools import count
from typing import Self

SOON = 20e-6  # seconds that are not worth a thread's turn


class Clock:
    """Seconds since an instant that all processes of a machine share. Used as a context manager, inside one loop."""

    now = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._wake, daemon=True)

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    async def until(self, instant: float) -> None:
        if instant - self.now() <= SOON:
            return
        future = self._loop.create_future()
        with self._changed:
            heapq.heappush(self._waiting, (instant, next(self._order), future))
            if self._waiting[0][2] is future:
                self._changed.notify()
        await future

    def _wake(self) -> None:
        with self._changed:
            while not self._closed:
                due = []
                while self._waiting and self._waiting[0][0] - self.now() <= SOON:
                    due.append(heapq.heappop(self._waiting)[2])
                if due:
                    self._loop.call_soon_threadsafe(_resolve, due)
                self._changed.wait(self._waiting[0][0] - self.now() if self._waiting else None)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
