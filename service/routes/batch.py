"""One step each of many sessions in one request: they are submitted together, and each is answered for itself."""

import logging
from typing import NamedTuple
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from engine.batch import Append, AppendResult
from engine.errors import EngineError, InvalidInput
from keypast.batch import Step, Told, read_steps, write_outcomes
from keypast.schemas import BatchStep
from keypast.wire import Encoded, Form, WireError, is_safetensors, parse_key, reply_form
from service.auth import Tenant
from service.errors import note, problem_of
from service.lifecycle import Service, service_of
from service.limits import body_limit, read_body
from service.once import once_of_step
from service.openapi import batch_reply, batch_request, problems
from service.routes.inference import append_of, arrays_of, coded, outputs_of, size_of, told_of
from service.text import TextModel

logger = logging.getLogger("keypast.service")

router = APIRouter(prefix="/v1/batch", tags=["inference"], default_response_class=Response)


class _Asked(NamedTuple):
    """An item, and the operation that it became or why it did not."""

    session_id: str | None
    form: Form
    text: TextModel | None
    operation: Append | Exception


@router.post(
    "/step",
    openapi_extra=batch_request(),
    responses={200: batch_reply(), **problems(400, 413, 415, 422, 429, 503)},
)
async def batch_step(request: Request, tenant: Tenant) -> Response:
    """One position a row for each of many sessions, in one batch of the model. An item that is refused or fails has its
    own status and problem, and spoils no other. A session may be named once; its second item is refused. The
    `Idempotency-Key` is that of every item."""
    service = service_of(request)
    body = await read_body(request, body_limit(request, service.settings))
    asked = await coded(len(body), lambda: _read(service, tenant, request, body))
    operations = [one.operation for one in asked if isinstance(one.operation, Append)]
    results = iter(await service.worker.append_all(operations, request.receive))
    ended = [one.operation if isinstance(one.operation, Exception) else next(results) for one in asked]
    form: Form = "safetensors" if is_safetensors(request.headers.get("content-type")) else "nested"
    binary = reply_form(form, request.headers.get("accept")) == "safetensors"
    size = sum(size_of(result) for result in ended if isinstance(result, AppendResult))
    reply: Encoded = await coded(
        size,
        lambda: write_outcomes(
            [_told(request, one, result) for one, result in zip(asked, ended, strict=True)], binary=binary
        ),
    )
    return Response(reply.body, 200, None, reply.content_type)


def _read(service: Service, tenant: str, request: Request, body: bytes) -> list[_Asked]:
    """Raises WireError and its children for what is no list of steps."""
    seen: dict[str, int] = {}
    asked = []
    parse_key(request.headers.getlist("idempotency-key"))  # a wrong one is the whole request's
    content_type, limit = request.headers.get("content-type"), service.settings.max_batch_items
    for at, step in enumerate(read_steps(content_type, body, limit)):
        asked.append(_asked(service, tenant, request, step, seen))
        if step.session_id is not None:
            seen.setdefault(step.session_id, at)
    return asked


def _asked(service: Service, tenant: str, request: Request, step: Step, seen: dict[str, int]) -> _Asked:
    """`seen`: sessions that were named before, and by which item."""
    session_id, body = step
    if isinstance(body, WireError):
        return _Asked(session_id, "nested", None, body)
    wanted = body.request
    assert isinstance(wanted, BatchStep)  # that is what steps are read as
    try:
        if wanted.session_id in seen:
            message = f"is that of item {seen[wanted.session_id]} already; a session takes one step a request"
            raise InvalidInput("session_id", message)
        once = once_of_step(request, wanted, body.arrays)
        operation, text = append_of(service, wanted.session_id, tenant, wanted.if_match, once, body)
    except (EngineError, WireError) as error:
        return _Asked(session_id, body.form, None, error)
    return _Asked(session_id, body.form, text, operation)


def _told(request: Request, asked: _Asked, result: AppendResult | Exception) -> Told:
    named = {} if asked.session_id is None else {"session_id": asked.session_id}
    if isinstance(result, Exception):
        request_id = request.state.request_id
        if not isinstance(result, EngineError | WireError):
            logger.error("request %s failed", request_id, exc_info=result)
        path = None if asked.session_id is None else f"/v1/sessions/{quote(asked.session_id, safe='')}/step"
        problem = problem_of(result, path, request_id)
        note(request, problem)
        failed = {"status": problem.status, "replayed": False, "problem": problem.model_dump(exclude_none=True)}
        return Told(named | failed, {})
    once = asked.operation.once if isinstance(asked.operation, Append) else None
    replayed = once is not None and once.replayed
    reply = {"outputs": outputs_of(result, asked.text), **told_of(result)}
    form = "base64" if asked.form == "safetensors" else asked.form
    return Told({**named, "status": 200, "replayed": replayed, "reply": reply}, arrays_of(result), form)
