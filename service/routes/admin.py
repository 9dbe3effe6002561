"""What only an admin's key may do: see everybody's sessions, recount the books, drain."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from keypast.schemas import Health, ListSessions, OwnedPage, OwnedView
from keypast.wire import JSON_TYPE
from service.auth import admin
from service.lifecycle import service_of
from service.logs import audit
from service.openapi import problems, reply
from service.routes.sessions import page_of, view

router = APIRouter(
    prefix="/v1/admin", tags=["operations"], default_response_class=Response, dependencies=[Depends(admin)]
)


@router.get("/sessions", responses={200: reply(OwnedPage, "A page, oldest first."), **problems(401, 403, 422, 503)})
async def list_all_sessions(request: Request, query: Annotated[ListSessions, Query()]) -> Response:
    """Every tenant's sessions, oldest first, and whose they are."""
    infos, cursor = page_of(service_of(request).engine, None, query)
    owned = [OwnedView(**view(info).model_dump(), tenant=info.tenant) for info in infos]
    return Response(OwnedPage(data=owned, next_cursor=cursor).model_dump_json(), media_type=JSON_TYPE)


@router.get(
    "/check",
    responses={
        200: reply(Health, "They agree."),
        500: reply(Health, "They do not; `detail` says where."),
        **problems(401, 403, 503),
    },
)
async def check(request: Request) -> Response:
    """Counts blocks, lengths and queues anew, and says whether the books agree. Others wait meanwhile."""
    try:
        await asyncio.to_thread(service_of(request).engine.check)
    except RuntimeError as error:
        wrong = Health(status="inconsistent", detail=str(error))
        return Response(wrong.model_dump_json(), 500, media_type=JSON_TYPE)
    return Response(Health(status="ok").model_dump_json(exclude_none=True), media_type=JSON_TYPE)


@router.post("/drain", status_code=202, responses={202: reply(Health, "It has begun."), **problems(401, 403, 503)})
async def drain(request: Request) -> Response:
    """New work is refused from now on (503), what runs ends. The process stays, for the one who ends it."""
    service = service_of(request)
    service.drain()
    audit(request, "drain")
    return Response(Health(status="draining").model_dump_json(exclude_none=True), 202, media_type=JSON_TYPE)
