"""The application: routes, errors, one service."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from keypast.keys import KeysError
from service import openapi
from service.auth import PUBLIC, Authenticate, KeyRing
from service.bodies import Bodies
from service.direct import Direct
from service.errors import add_handlers
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


def create_app(load: Load, settings: Settings) -> FastAPI:
    """`load` gives the engine and its tokenizers; it is called on a thread of its own when the application starts.

    Raises SettingsError when the keys cannot be read.
    """

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
    app.state.traffic = Traffic()
    app.state.exposition = Exposition(app.state.service, app.state.traffic)
    for routes in (inference, batch, generation, sessions, past, events, models, oip, openai, admin, health, metrics):
        app.include_router(routes.router)
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
