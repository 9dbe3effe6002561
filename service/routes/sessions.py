"""Sessions: create, list, read, change, delete, fork, truncate. Nothing is computed here."""

import base64
import binascii
import math
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from engine.batch import Truncate
from engine.engine import Engine
from engine.errors import InvalidInput
from engine.session import SessionChanges
from engine.stats import SessionInfo
from keypast.schemas import (
    CreateSession,
    ForkReply,
    ForkRequest,
    ListSessions,
    Receipt,
    SessionPage,
    SessionView,
    TruncateRequest,
    UpdateSession,
)
from keypast.wire import JSON_TYPE, MERGE_PATCH_TYPE, etag, parse_if_match
from service.auth import Tenant
from service.lifecycle import service_of
from service.limits import json_limit, read_json
from service.logs import audit
from service.once import once_of, read_change, replay_headers
from service.openapi import (
    GUARDS,
    IF_MATCH,
    KEY,
    REPLAYED_HEADER,
    VERSION_HEADERS,
    json_request,
    patch_request,
    problems,
    reply,
)

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], default_response_class=Response)

_LOCATION = {"Location": {"description": "The session's address.", "schema": {"type": "string"}}}


@router.post(
    "",
    status_code=201,
    openapi_extra={**json_request(CreateSession), "parameters": [KEY]},
    responses={
        201: reply(SessionView, "Created.", VERSION_HEADERS | _LOCATION | REPLAYED_HEADER),
        **problems(400, 404, 409, 413, 415, 422, 429, 503),
    },
)
async def create_session(request: Request, tenant: Tenant) -> Response:
    """An empty session."""
    service = service_of(request)
    wanted, once = await read_change(request, CreateSession, json_limit(service.settings))
    info = service.engine.create_session(
        wanted.model,
        tenant=tenant,
        session_id=wanted.id,
        batch_size=wanted.batch_size,
        max_length=wanted.max_length,
        ttl_seconds=wanted.ttl_seconds,
        pinned=wanted.pinned,
        labels=wanted.labels,
        once=once,
    )
    if not once.replayed:
        audit(request, "create", info.id, model=info.model)
    return session_response(info, 201, {"Location": f"/v1/sessions/{info.id}", **replay_headers(once)})


@router.get("", responses={200: reply(SessionPage, "A page, oldest first."), **problems(422, 503)})
async def list_sessions(request: Request, tenant: Tenant, query: Annotated[ListSessions, Query()]) -> Response:
    """The caller's sessions, oldest first. A page holds what follows its cursor, whatever was deleted meanwhile."""
    infos, cursor = page_of(service_of(request).engine, tenant, query)
    body = SessionPage(data=[view(info) for info in infos], next_cursor=cursor)
    return Response(body.model_dump_json(), media_type=JSON_TYPE)


def page_of(engine: Engine, tenant: str | None, query: ListSessions) -> tuple[list[SessionInfo], str | None]:
    """A page of the tenant's sessions (None: of everybody's), and the next one's cursor. Raises InvalidInput."""
    infos = engine.sessions(
        tenant,
        model=query.model,
        state=query.state,
        labels=[_label(wanted) for wanted in query.label],
        after=None if query.cursor is None else _read_cursor(query.cursor),
        limit=query.limit + 1,
    )
    page = infos[: query.limit]
    return page, _write_cursor(page[-1]) if len(infos) > len(page) else None


@router.get(
    "/{session_id}",
    openapi_extra={"parameters": [IF_MATCH]},
    responses={200: reply(SessionView, "The session.", VERSION_HEADERS), **problems(404, 410, 412, 422, 503)},
)
async def get_session(request: Request, session_id: str, tenant: Tenant) -> Response:
    """The session as it is now."""
    expected = parse_if_match(request.headers.get("if-match"))
    return session_response(service_of(request).engine.session(session_id, tenant, expected_version=expected))


@router.patch(
    "/{session_id}",
    openapi_extra=patch_request(UpdateSession),
    responses={
        200: reply(SessionView, "The session, changed.", VERSION_HEADERS),
        **problems(400, 404, 410, 412, 413, 415, 422, 429, 503),
    },
)
async def update_session(request: Request, session_id: str, tenant: Tenant) -> Response:
    """Time to live, pin and labels. No commit: the version stays."""
    service = service_of(request)
    wanted = await read_json(request, UpdateSession, json_limit(service.settings), MERGE_PATCH_TYPE)
    expected = parse_if_match(request.headers.get("if-match"))
    changes: SessionChanges = {}
    if "ttl_seconds" in wanted.model_fields_set:
        changes["ttl_seconds"] = wanted.ttl_seconds
    if "pinned" in wanted.model_fields_set:
        changes["pinned"] = bool(wanted.pinned)
    if "labels" in wanted.model_fields_set:
        changes["labels"] = wanted.labels
    info = service.engine.update_session(session_id, tenant, expected_version=expected, **changes)
    return session_response(info)


@router.delete(
    "/{session_id}",
    openapi_extra={"parameters": GUARDS},
    responses={200: reply(Receipt, "What was freed.", REPLAYED_HEADER), **problems(404, 410, 412, 422, 503)},
)
async def delete_session(request: Request, session_id: str, tenant: Tenant) -> Response:
    """Frees every block now, also while an append runs. With a key, the same receipt as often as it is asked for."""
    once = once_of(request)
    expected = parse_if_match(request.headers.get("if-match"))
    receipt = service_of(request).engine.delete_session(session_id, tenant, expected_version=expected, once=once)
    if not once.replayed:
        audit(request, "delete", receipt.id, positions=receipt.positions)
    body = Receipt(
        id=receipt.id,
        positions=receipt.positions,
        bytes=receipt.bytes,
        blocks_freed=receipt.blocks_freed,
        blocks_still_shared=receipt.blocks_still_shared,
    )
    return Response(body.model_dump_json(), 200, replay_headers(once), JSON_TYPE)


@router.post(
    "/{session_id}/fork",
    status_code=201,
    openapi_extra={**json_request(ForkRequest), "parameters": GUARDS},
    responses={
        201: reply(ForkReply, "The children; `ETag` is theirs.", VERSION_HEADERS | REPLAYED_HEADER),
        **problems(400, 404, 410, 412, 413, 415, 422, 429, 503),
    },
)
async def fork_session(request: Request, session_id: str, tenant: Tenant) -> Response:
    """Children that share the session's blocks until one of them writes."""
    service = service_of(request)
    wanted, once = await read_change(request, ForkRequest, json_limit(service.settings))
    expected = parse_if_match(request.headers.get("if-match"))
    children = service.engine.fork(
        session_id, tenant=tenant, count=wanted.count, at=wanted.at, expected_version=expected, once=once
    )
    for child in children if not once.replayed else ():
        audit(request, "fork", child.id, parent=session_id)
    reply = ForkReply(sessions=[view(child) for child in children])
    headers = {"ETag": etag(children[0].version), **replay_headers(once)}
    return Response(reply.model_dump_json(), 201, headers, JSON_TYPE)


@router.post(
    "/{session_id}/truncate",
    openapi_extra={**json_request(TruncateRequest), "parameters": GUARDS},
    responses={
        200: reply(SessionView, "The session, shorter.", VERSION_HEADERS | REPLAYED_HEADER),
        **problems(400, 404, 410, 412, 413, 415, 422, 429, 503),
    },
)
async def truncate_session(request: Request, session_id: str, tenant: Tenant) -> Response:
    """Back to an earlier length, as if what came after it had never been."""
    service = service_of(request)
    wanted, once = await read_change(request, TruncateRequest, json_limit(service.settings))
    expected = parse_if_match(request.headers.get("if-match"))
    operation = Truncate(session_id, wanted.length, tenant, expected_version=expected, once=once)
    info = await service.worker.truncate(operation, request.receive)
    return session_response(info, 200, replay_headers(once))


def session_response(info: SessionInfo, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(view(info).model_dump_json(), status, {"ETag": etag(info.version), **(headers or {})}, JSON_TYPE)


def view(info: SessionInfo) -> SessionView:
    return SessionView(
        id=info.id,
        model=info.model,
        kind=info.kind,
        state=info.state,
        batch_size=len(info.valid_length),
        valid_length=info.valid_length,
        max_length=info.max_length,
        version=info.version,
        bytes=info.bytes,
        blocks=info.blocks,
        shared_blocks=info.shared_blocks,
        parent=info.parent,
        labels=info.labels,
        ttl_seconds=info.ttl_seconds,
        pinned=info.pinned,
        created_at=utc(info.created_at),
        last_used_at=utc(info.last_used_at),
        expires_at=None if info.expires_at is None else utc(info.expires_at),
    )


def utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _label(wanted: str) -> tuple[str, str | None]:
    """From `key`, with any value, or `key=value`."""
    key, equals, value = wanted.partition("=")
    return key, value if equals else None


def _write_cursor(info: SessionInfo) -> str:
    return base64.urlsafe_b64encode(info.created_at.hex().encode()).decode()


def _read_cursor(cursor: str) -> float:
    try:
        after = float.fromhex(base64.b64decode(cursor, altchars=b"-_", validate=True).decode())
    except (ValueError, OverflowError, binascii.Error):
        after = math.nan
    if not math.isfinite(after):
        raise InvalidInput("cursor", "is not the next_cursor of a page")
    return after
