"""The application: routes, errors, one service."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from service import openapi
from service.errors import add_handlers
from service.lifecycle import Load, Service
from service.logs import RequestLog
from service.routes import batch, events, generation, health, inference, models, past, sessions
from service.settings import Settings


def create_app(load: Load, settings: Settings) -> FastAPI:
    """`load` gives the engine and its tokenizers; it is called on a thread of its own when the application starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        service: Service = app.state.service
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="keypast",
        summary="KV-cache sessions over HTTP: hold, step, fork and roll back a transformer's past",
        version=version("keypast"),
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    app.state.service = Service(load, settings)
    for routes in (inference, batch, generation, sessions, past, events, models, health):
        app.include_router(routes.router)
    add_handlers(app)
    openapi.install(app)
    app.add_middleware(RequestLog)
    return app
