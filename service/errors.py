"""From what went wrong to a status and a body. One table for the engine's errors, one body for everybody.

Every error is an RFC 9457 problem that carries OpenAI's `error` object too, so that both kinds of client can read it;
below /v2 it is what the Open Inference Protocol's clients read, `{"error": "..."}`.
"""

import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.routing import Match

from engine.errors import (
    DeviceFull,
    EngineError,
    EngineStopped,
    InvalidInput,
    KeyReused,
    LengthExceeded,
    ModelFailed,
    ModelNotFound,
    Moved,
    PoolExhausted,
    QueueFull,
    QuotaExceeded,
    Refused,
    ReplyDropped,
    SessionExists,
    SessionGone,
    SessionNotFound,
    WrongState,
)
from keypast.oip import Refusal
from keypast.schemas import Code, ErrorBody, Problem
from keypast.wire import JSON_TYPE, MalformedError, UnsupportedMediaError, WireError, etag, validation_error

PROBLEM_TYPE = "application/problem+json"
STOPPED_RETRY_AFTER = 1.0  # seconds: another replica, or this one restarted, may take it
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class BodyTooLarge(Exception):
    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is longer than {limit} bytes")


class BodyTooFine(Exception):
    """It comes in more and smaller pieces than anybody needs."""


class BodiesFull(Exception):
    """All the bodies that are coming in take the memory that there is for them."""


class BodyTooSlow(Exception):
    """Nothing was applied; the client may send it again."""


class Unauthorized(Exception):
    """The same words for every key that does not open: none, forged, over, removed."""

    def __init__(self) -> None:
        super().__init__("there is no valid API key; send one as `Authorization: Bearer KEY` or `X-API-Key: KEY`")


class Forbidden(Exception):
    """The key is valid, and not for this."""


class NotReady(Exception):
    """The models are not loaded yet."""


ENGINE_ERRORS: dict[type[EngineError], tuple[HTTPStatus, Code]] = {
    InvalidInput: (HTTPStatus.UNPROCESSABLE_ENTITY, Code.INVALID_INPUT),
    LengthExceeded: (HTTPStatus.UNPROCESSABLE_ENTITY, Code.LENGTH_EXCEEDED),
    KeyReused: (HTTPStatus.UNPROCESSABLE_ENTITY, Code.KEY_REUSED),
    ModelNotFound: (HTTPStatus.NOT_FOUND, Code.MODEL_NOT_FOUND),
    SessionNotFound: (HTTPStatus.NOT_FOUND, Code.SESSION_NOT_FOUND),
    SessionExists: (HTTPStatus.CONFLICT, Code.SESSION_EXISTS),
    SessionGone: (HTTPStatus.GONE, Code.SESSION_GONE),
    WrongState: (HTTPStatus.CONFLICT, Code.WRONG_STATE),
    Moved: (HTTPStatus.PRECONDITION_FAILED, Code.MOVED),
    ReplyDropped: (HTTPStatus.PRECONDITION_FAILED, Code.REPLY_DROPPED),
    QuotaExceeded: (HTTPStatus.TOO_MANY_REQUESTS, Code.QUOTA_EXCEEDED),
    QueueFull: (HTTPStatus.TOO_MANY_REQUESTS, Code.QUEUE_FULL),
    PoolExhausted: (HTTPStatus.TOO_MANY_REQUESTS, Code.POOL_EXHAUSTED),
    ModelFailed: (HTTPStatus.INTERNAL_SERVER_ERROR, Code.MODEL_FAILED),
    EngineStopped: (HTTPStatus.SERVICE_UNAVAILABLE, Code.ENGINE_STOPPED),
    DeviceFull: (HTTPStatus.SERVICE_UNAVAILABLE, Code.DEVICE_FULL),
}

_UNREAD = (Code.BODY_TOO_LARGE, Code.TOO_SLOW, Code.BODY_TOO_FINE, Code.BODIES_FULL)
_HTTP_CODES = {404: Code.NOT_FOUND, 405: Code.METHOD_NOT_ALLOWED, 413: Code.BODY_TOO_LARGE}


def problem_of(error: BaseException, path: str | None = None, request_id: str | None = None) -> Problem:
    """The problem that tells of an error; an error nobody foresaw is told of without a word of what it says."""
    status, code, members = _told(error)
    detail = str(members.pop("detail", error))
    return refusal_problem(status, code, detail, instance=path, request_id=request_id, **members)


def refusal_problem(status: HTTPStatus, code: Code, detail: str, **members: Any) -> Problem:  # noqa: ANN401
    body = ErrorBody(message=detail, type=_openai_type(status), param=members.get("field"), code=code)
    return Problem(title=status.phrase, status=status, detail=detail, code=code, error=body, **members)


def note(request: HTTPConnection, problem: Problem) -> None:
    """For who counts what clients are told: a reply may tell of no problem, of one, or of many."""
    request.scope.setdefault("state", {}).setdefault("problems", []).append(problem.code)


def problem_response(request: Request, error: Exception) -> Response:
    problem = problem_of(error, request.url.path, request.scope.get("state", {}).get("request_id"))
    note(request, problem)
    headers = {}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(problem.retry_after))
    if problem.version is not None:
        headers["ETag"] = etag(problem.version)
    if problem.status == HTTPStatus.CONFLICT:
        headers["x-should-retry"] = "false"  # generated clients re-send a 409 unless told
    if problem.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="keypast"'
    if problem.code in _UNREAD:
        headers["Connection"] = "close"  # the rest of the body is not read
    if problem.status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_allowed(request))
    if request.scope["path"] == "/v2" or request.scope["path"].startswith("/v2/"):
        return Response(Refusal(error=problem.detail).model_dump_json(), problem.status, headers, JSON_TYPE)
    return Response(problem.model_dump_json(exclude_none=True), problem.status, headers, PROBLEM_TYPE)


# What a handler may raise on purpose.
TOLD = (
    BodyTooLarge,
    BodyTooSlow,
    BodyTooFine,
    BodiesFull,
    Unauthorized,
    Forbidden,
    NotReady,
    EngineError,
    WireError,
    RequestValidationError,
    HTTPException,
)


def add_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        return problem_response(request, error)

    for kind in TOLD:
        app.add_exception_handler(kind, handle)


def _told(error: BaseException) -> tuple[HTTPStatus, Code, dict[str, Any]]:
    """Status, code and the problem's further members."""
    members: dict[str, Any] = {}
    match error:
        case EngineError() if type(error) in ENGINE_ERRORS:
            status, code = ENGINE_ERRORS[type(error)]
            return status, code, _engine_members(error)
        case RequestValidationError():
            first = error.errors()[0]
            return _told(validation_error({**first, "loc": first["loc"][1:]}))  # from ("query", "limit") to limit
        case MalformedError():
            status, code = HTTPStatus.BAD_REQUEST, Code.MALFORMED
        case UnsupportedMediaError():
            status, code = HTTPStatus.UNSUPPORTED_MEDIA_TYPE, Code.UNSUPPORTED_MEDIA_TYPE
        case WireError():
            status, code = HTTPStatus.UNPROCESSABLE_ENTITY, Code.INVALID_INPUT
            members["field"] = error.field
        case BodyTooLarge():
            status, code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, Code.BODY_TOO_LARGE
        case BodyTooSlow():
            status, code = HTTPStatus.REQUEST_TIMEOUT, Code.TOO_SLOW
        case BodyTooFine():
            status, code = HTTPStatus.BAD_REQUEST, Code.BODY_TOO_FINE
        case BodiesFull():
            status, code = HTTPStatus.SERVICE_UNAVAILABLE, Code.BODIES_FULL
            members["retry_after"] = STOPPED_RETRY_AFTER
        case Unauthorized():
            status, code = HTTPStatus.UNAUTHORIZED, Code.UNAUTHORIZED
        case Forbidden():
            status, code = HTTPStatus.FORBIDDEN, Code.FORBIDDEN
        case NotReady():
            status, code = HTTPStatus.SERVICE_UNAVAILABLE, Code.NOT_READY
            members["retry_after"] = STOPPED_RETRY_AFTER
        case HTTPException():
            status = HTTPStatus(error.status_code)
            code, members["detail"] = _HTTP_CODES.get(status, Code.MALFORMED), error.detail
        case _:
            status, code = HTTPStatus.INTERNAL_SERVER_ERROR, Code.INTERNAL
            members["detail"] = "the service failed; its log has the details under this request id"
    members.setdefault("detail", str(error))
    return status, code, members


def _engine_members(error: EngineError) -> dict[str, Any]:
    match error:
        case InvalidInput():
            return {"field": error.field}
        case SessionGone():
            return {"reason": error.reason}
        case Moved():
            return {"version": error.version, "valid_length": error.valid_length}
        case Refused():
            return {"retry_after": error.retry_after}
        case EngineStopped():
            return {"retry_after": STOPPED_RETRY_AFTER}
    return {}


def _openai_type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return "authentication_error" if status == HTTPStatus.UNAUTHORIZED else "permission_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _allowed(request: Request) -> list[str]:
    """Every method of the path, though its routes are many."""
    routes = request.app.router.routes
    scope = {key: request.scope[key] for key in ("type", "path", "headers")} | {"root_path": "", "path_params": {}}
    methods = [m for m in METHODS if any(r.matches({**scope, "method": m})[0] is Match.FULL for r in routes)]
    return ["HEAD", *methods] if "GET" in methods else methods
