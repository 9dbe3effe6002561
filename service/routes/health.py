"""Is it alive, is it ready, what is it."""

from importlib.metadata import version

from fastapi import APIRouter, Request, Response

from keypast.schemas import Health, Version
from keypast.wire import JSON_TYPE
from service.lifecycle import Service, service_of
from service.openapi import Documented, reply

router = APIRouter(tags=["operations"], default_response_class=Response)

_READY: Documented = {200: reply(Health, "It takes work."), 503: reply(Health, "Loading, draining or down.")}


@router.get("/livez", responses={200: reply(Health, "The process answers.")})
async def livez() -> Response:
    """200 while the process can answer at all, loading included."""
    return Response(Health(status="ok").model_dump_json(exclude_none=True), media_type=JSON_TYPE)


@router.get("/readyz", responses=_READY)
async def readyz(request: Request) -> Response:
    """200 when new work is taken. Where keys are asked for it does not say why not: /health does."""
    service = service_of(request)
    return _health(service, None if service.settings.guarded else service.detail)


def _health(service: Service, detail: str | None) -> Response:
    if service.status == "ready":
        return Response(Health(status="ready").model_dump_json(exclude_none=True), media_type=JSON_TYPE)
    body = Health(status=service.status, detail=detail).model_dump_json(exclude_none=True)
    return Response(body, 503, {"Retry-After": "1"}, JSON_TYPE)


@router.get("/health", responses=_READY)
async def health(request: Request) -> Response:
    """The same as /readyz, and what is being loaded or went wrong."""
    service = service_of(request)
    return _health(service, service.detail)


@router.get("/version", responses={200: reply(Version, "The service's version.")})
async def service_version() -> Response:
    return Response(Version(version=version("keypast")).model_dump_json(), media_type=JSON_TYPE)
