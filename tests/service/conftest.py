import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.lifecycle import Service
from service.settings import Settings
from tests.service.fakes import KINDS, Fakes, Kind


@dataclass
class Running:
    """The service in this process, and the fakes beneath it."""

    app: FastAPI
    client: httpx.AsyncClient
    fakes: Fakes

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    async def session(self, kind: Kind | str, **fields: object) -> str:
        """A new session's id."""
        model = kind if isinstance(kind, str) else kind.model
        reply = await self.client.post("/v1/sessions", json={"model": model, **fields})
        assert reply.status_code == 201, reply.text
        session_id: str = reply.json()["id"]
        return session_id

    async def prefilled(self, kind: Kind, n: int, **fields: object) -> str:
        session_id = await self.session(kind, **fields)
        rows = fields.get("batch_size", 1)
        assert isinstance(rows, int)
        reply = await self.client.post(f"/v1/sessions/{session_id}/prefill", json=kind.json(n, rows=rows))
        assert reply.status_code == 200, reply.text
        return session_id

    def state(self) -> list[Any]:
        """All that a refused request must leave as it was."""
        sessions = [
            (info.id, info.valid_length, info.version, info.blocks, info.state) for info in self.fakes.engine.sessions()
        ]
        return [sessions, self.fakes.engine.capacity()]


if TYPE_CHECKING:
    from service.tracing import Tracing

Start = Callable[..., Any]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts services; when the test is over each must be whole."""
    stack = AsyncExitStack()
    started: list[Fakes] = []

    @asynccontextmanager
    async def run(fakes: Fakes, settings: Settings, tracing: "Tracing | None") -> AsyncIterator[Running]:
        app = create_app(lambda progress: fakes.loaded(), settings, tracing)
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://k") as c:
            running = Running(app, c, fakes)
            await running.service.loaded()
            yield running

    async def start_one(
        *, settings: dict[str, Any] | None = None, tracing: "Tracing | None" = None, **engine: Any
    ) -> Running:
        fakes = Fakes.build(**engine)
        started.append(fakes)
        return await stack.enter_async_context(
            run(fakes, Settings(**{"drain_seconds": 1.0, **(settings or {})}), tracing)
        )

    yield start_one
    for fakes in started:
        fakes.decoder.gate.set()
        fakes.attention.gate.set()
    await stack.aclose()
    for fakes in started:
        assert fakes.engine.idle
        fakes.engine.check()


@pytest.fixture
async def running(start: Start) -> Running:
    service: Running = await start()
    return service


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


async def until(condition: Callable[[], bool]) -> None:
    """Fails the test by its time limit when it never holds."""
    while not condition():
        await asyncio.sleep(0.002)
