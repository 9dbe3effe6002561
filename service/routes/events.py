"""What happens to the caller's sessions, as it happens."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from engine.events import Gap, SessionEvent
from keypast.schemas import Event
from service.auth import Tenant
from service.lifecycle import service_of
from service.openapi import LAST_EVENT_ID, event_stream, problems
from service.routes.sessions import utc
from service.streams import EVENT_STREAM, PING, EventStream, named_event

router = APIRouter(prefix="/v1", tags=["sessions"], default_response_class=Response)

_STREAM = {
    "description": "Server-sent events: `id`, `event` (the type), `data` (an Event); comments while there is silence.",
    "content": event_stream(Event),
}


@router.get(
    "/events", openapi_extra={"parameters": [LAST_EVENT_ID]}, responses={200: _STREAM, **problems(422, 429, 503)}
)
async def events(request: Request, tenant: Tenant) -> Response:
    """What happens to the caller's sessions from now on, or after the event of `Last-Event-ID`. Some are kept for those
    who come back or read slowly; where more were missed, an event `gap` says so: look at the sessions again."""
    service = service_of(request)
    after, silence = request.headers.get("last-event-id"), service.settings.ping_seconds
    told = service.watching.follow(tenant, after, request.receive, silence)
    first = await anext(told)  # what is refused still has a status of its own
    if request.state.only_head:
        await told.aclose()
        return Response(media_type=EVENT_STREAM)
    return EventStream(_written(first, told), end=b"")


async def _written(
    told: list[SessionEvent | Gap], more: AsyncGenerator[list[SessionEvent | Gap]]
) -> AsyncGenerator[bytes]:
    async with aclosing(more):
        yield PING
        async for told in more:
            yield b"".join(map(_sse, told)) or PING


def _sse(told: SessionEvent | Gap) -> bytes:
    if isinstance(told, Gap):
        event = Event(id=told.id, type="gap", lost=told.lost)
    else:
        event = Event(
            id=told.id,
            type=told.kind,
            at=utc(told.at),
            session_id=told.session_id,
            model=told.model,
            version=told.version,
            valid_length=told.valid_length.tolist(),
            parent=told.parent,
        )
    return named_event(event.id, event.type, event.model_dump_json(exclude_none=True))
