"""The application: routes, errors, one service."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.routing import APIRoute

from keypast.keys import KeysError
from service import openapi
from service.auth import PUBLIC, Authenticate, KeyRing
from service.bodies import Bodies
from service.direct import Direct
from service.errors import add_handlers
from service.finder import Finder
from service.host import processors
from service.lifecycle import Load, Service
from service.limits import RequestRate, Turnstile
from service.logs import RequestLog
from service.metrics import Exposition
from service.routes import (
    admin,
    batch,
    events,
    generation,
    health,
    inference,
    metrics,
    models,
    oip,
    openai,
    past,
    sessions,
)
from service.settings import Settings, SettingsError
from service.traffic import Traffic

if TYPE_CHECKING:
    from service.tracing import Tracing


def create_app(load: Load, settings: Settings, tracing: "Tracing | None" = None) -> FastAPI:
    """`load` gives the engine and its tokenizers; it is called on a thread of its own when the application starts.
    `tracing`: else what the settings say, which is none at all if they are silent.

    Raises SettingsError when the keys cannot be read, and when traces are asked for and cannot be made.
    """
    tracing = tracing or _tracing(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        service: Service = app.state.service
        service.start()
        yield
        await service.stop()
        if tracing is not None:
            await tracing.close()

    app = FastAPI(
        title="keypast",
        summary="KV-cache sessions over HTTP: hold, step, fork and roll back a transformer's past",
        version=version("keypast"),
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    app.state.service = Service(load, settings) if tracing is None else Service(load, settings, tracing.desk)
    app.state.traffic = Traffic() if tracing is None else tracing.traffic
    app.state.exposition = Exposition(app.state.service, app.state.traffic)
    modules = (inference, batch, generation, sessions, past, events, models, oip, openai, admin, health, metrics)
    routes = [route for module in modules for route in module.router.routes if isinstance(route, APIRoute)]
    app.router.routes[:0] = [Finder(routes), *routes]
    add_handlers(app)
    openapi.install(app, PUBLIC)
    app.add_middleware(Direct, inference.router.routes)
    app.add_middleware(Bodies, settings.body_seconds, settings.bodies_bytes)
    guaranteed = [tenant for tenant, quota in settings.tenant_quotas.items() if quota.guaranteed_blocks]
    per_second = 50 * processors() if settings.guard_requests is None else settings.guard_requests
    turnstile = Turnstile(guaranteed, per_second)
    app.add_middleware(Authenticate, _keys(settings), RequestRate(settings.requests_per_minute), turnstile)
    app.add_middleware(RequestLog, app.state.traffic)
    return app


def _keys(settings: Settings) -> KeyRing:
    try:
        return KeyRing(settings.keys, settings.keys_file and settings.keys_file.expanduser())
    except KeysError as error:
        raise SettingsError(f"KEYPAST_KEYS{'_FILE' * (settings.keys_file is not None)}: {error}") from None


def _tracing(settings: Settings) -> "Tracing | None":
    if not settings.otlp_endpoint:
        return None
    try:
        from service.tracing import Tracing
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"KEYPAST_OTLP_ENDPOINT={settings.otlp_endpoint}: traces need {error.name}, which is not installed: "
            "pip install 'keypast[otel]', or leave the setting out"
        ) from None
    return Tracing.to(settings)
