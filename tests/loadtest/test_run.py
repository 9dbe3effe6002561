"""What a run does beside its load."""

import asyncio
from datetime import UTC, datetime

from keypast.loadtest.run import Run, look_at_memory
from tests.loadtest.fake_server import Answer, FakeServer, always
from tests.loadtest.loads import plan

NOTHING = Answer(body=b'{"pools": []}')


def test_who_looks_at_the_memory_stops_when_told_wherever_it_is() -> None:
    """Also when the reply comes in that very moment."""

    async def stopped(server: FakeServer, turns: int) -> bool:
        """That many turns of the event loop after the question arrived, which takes the reply some."""
        asked = len(server.asked)
        looking = asyncio.create_task(look_at_memory(Run(plan(server.url), datetime.now(UTC), 0.0)))
        while len(server.asked) == asked:
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        looking.cancel()
        await asyncio.wait([looking], timeout=1)
        return looking.done()

    async def every() -> list[bool]:
        return [await stopped(server, turns) for turns in [*range(20)] * 3]

    with FakeServer(always(NOTHING)) as server:
        assert all(asyncio.run(every()))
