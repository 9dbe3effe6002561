"""A session's past out and in, as one file. Long work on it is done on threads: others are answered meanwhile."""

import asyncio

from fastapi import APIRouter, Request, Response

from engine.batch import ExportPast, ImportPast, SessionPast
from keypast.past import Past
from keypast.schemas import SessionView
from keypast.wire import SAFETENSORS_TYPE, check_safetensors, etag, parse_if_match
from service.auth import Tenant
from service.lifecycle import service_of
from service.limits import read_body
from service.logs import audit
from service.once import once_of, replay_headers
from service.openapi import IF_MATCH, REPLAYED_HEADER, VERSION_HEADERS, past_reply, past_request, problems, reply
from service.routes.sessions import session_response
from service.streams import LongBody

router = APIRouter(prefix="/v1/sessions/{session_id}", tags=["sessions"], default_response_class=Response)


@router.get(
    "/past",
    openapi_extra={"parameters": [IF_MATCH]},
    responses={200: past_reply(), **problems(404, 410, 412, 422, 429, 500, 503)},
)
async def export_past(request: Request, session_id: str, tenant: Tenant) -> Response:
    """The session's keys and values, in MindSpore's layout; zero past a row's valid length. The session stays."""
    expected = parse_if_match(request.headers.get("if-match"))
    operation = ExportPast(session_id, tenant, expected)
    result = await service_of(request).worker.export_past(operation, request.receive)
    audit(request, "export", session_id, version=result.version)
    past = result.past
    file = Past(past.arrays, past.valid_length, past.kind, past.fingerprint)
    return LongBody(await asyncio.to_thread(file.parts), {"ETag": etag(result.version)}, SAFETENSORS_TYPE)


@router.put(
    "/past",
    openapi_extra=past_request(),
    responses={
        200: reply(SessionView, "The session, with that past.", VERSION_HEADERS | REPLAYED_HEADER),
        **problems(400, 404, 409, 410, 412, 413, 415, 422, 429, 500, 503),
    },
)
async def import_past(request: Request, session_id: str, tenant: Tenant) -> Response:
    """A past that was exported, into an empty session of the same model; one version, as an append."""
    service = service_of(request)
    service.engine.session(session_id, tenant)  # so that nobody sends much in vain
    check_safetensors(request.headers.get("content-type"))
    expected = parse_if_match(request.headers.get("if-match"))
    body = await read_body(request, service.settings.max_past_bytes)
    once = await asyncio.to_thread(once_of, request, body)
    file = await asyncio.to_thread(Past.from_bytes, body)
    past = SessionPast(file.arrays, file.valid_length, file.kind, file.fingerprint)
    operation = ImportPast(session_id, past, tenant, expected, once)
    info = await service.worker.import_past(operation, request.receive)
    if not once.replayed:
        audit(request, "import", session_id, version=info.version)
    return session_response(info, 200, replay_headers(once))
