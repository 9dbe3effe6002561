"""Who watches what happens to sessions: one place for each open stream of events, and how many a tenant may have."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

from starlette.types import Receive

from engine.errors import EngineStopped, QueueFull
from engine.events import EventLog, Gap, SessionEvent
from service.worker import ReaderGone, left, tell

AT_ONCE = 64  # events that are taken from the ring at a time


class Watching:
    """`ended` is set when no more events will come; every stream then ends."""

    def __init__(self, log: EventLog, ended: asyncio.Event, per_tenant: int) -> None:
        self._log = log
        self._ended = ended
        self._per_tenant = per_tenant
        self._open: Counter[str] = Counter()

    async def follow(
        self, tenant: str, after: str | None, receive: Receive, silence: float
    ) -> AsyncGenerator[list[SessionEvent | Gap]]:
        """What happens after the event of that id, or from now on; an empty list at first, and after every `silence`
        seconds without an event. The reader's own pace decides when more is taken: events wait in the ring alone.

        Raises EngineStopped, QueueFull and InvalidInput at once, ReaderGone later.
        """
        if self._ended.is_set():
            raise EngineStopped("nothing happens any more")
        if self._open[tenant] >= self._per_tenant:
            raise QueueFull(f"{self._per_tenant} event streams are open already; close one")
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        watch = self._log.watch(tenant, after, lambda: tell(loop, news.set))
        self._open[tenant] += 1
        gone, ended = asyncio.ensure_future(left(receive)), asyncio.ensure_future(self._ended.wait())
        for end in (gone, ended):
            end.add_done_callback(lambda _: news.set())
        try:
            yield []
            while True:
                news.clear()
                events = watch.read(AT_ONCE)
                if gone.done():
                    raise ReaderGone
                if events:
                    yield events
                elif ended.done():
                    return
                elif not await _within(silence, news):
                    yield []
        finally:
            watch.close()
            gone.cancel()
            ended.cancel()
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]


async def _within(seconds: float, news: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await news.wait()
    except TimeoutError:
        return False
