"""Prefill, step and score: parse, submit, reply. One path for every kind of model."""

import asyncio
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from fastapi import APIRouter, Request, Response

from engine.batch import Append, AppendResult, GenerateResult, Once, Want
from engine.errors import InvalidInput
from keypast.schemas import (
    AppendReply,
    AppendRequest,
    Outputs,
    PrefillRequest,
    ScoreRequest,
    StepRequest,
)
from keypast.wire import AppendBody, Array, Encoded, Form, parse_if_match, read_append, reply_form, write_reply
from service.auth import Tenant
from service.lifecycle import Service, service_of
from service.limits import body_limit, read_body
from service.once import once_of, replay_headers
from service.openapi import append_reply, append_request, problems
from service.text import TextModel, encode_rows, pad, sampling

T = TypeVar("T")

LARGE = 256 << 10  # bytes from which coding is worth a thread of its own, so that others are answered meanwhile

router = APIRouter(prefix="/v1/sessions/{session_id}", tags=["inference"], default_response_class=Response)

_RESPONSES = {200: append_reply(), **problems(400, 404, 409, 410, 412, 413, 415, 422, 429, 500, 503)}


@router.post("/step", openapi_extra=append_request(StepRequest), responses=_RESPONSES)
async def step(request: Request, session_id: str, tenant: Tenant) -> Response:
    """Appends exactly one position a row to a past that is not empty, or asks it one query a row (`query` alone)."""
    return await _append(request, session_id, tenant, StepRequest)


@router.post("/prefill", openapi_extra=append_request(PrefillRequest), responses=_RESPONSES)
async def prefill(request: Request, session_id: str, tenant: Tenant) -> Response:
    """Appends any number of positions to any past, empty or not, and asks any number of queries."""
    return await _append(request, session_id, tenant, PrefillRequest)


@router.post("/score", openapi_extra=append_request(ScoreRequest), responses=_RESPONSES)
async def score(request: Request, session_id: str, tenant: Tenant) -> Response:
    """What a prefill of the same body would answer; the session stays exactly as it is."""
    return await _append(request, session_id, tenant, ScoreRequest)


async def _append(request: Request, session_id: str, tenant: str, kind: type[AppendRequest]) -> Response:
    service = service_of(request)
    worker = service.worker
    body = await read_body(request, body_limit(request, service.settings))
    read = await coded(len(body), lambda: _read(service, request, session_id, tenant, kind, body))
    result = await worker.append(read.operation, request.receive)
    form = reply_form(read.form, request.headers.get("accept"))
    reply = await coded(size_of(result), lambda: _write(result, read.text, form))
    return Response(reply.body, 200, reply.headers | replay_headers(read.once), reply.content_type)


async def coded(size: int, code: Callable[[], T]) -> T:
    """On a thread of its own when it is much."""
    return code() if size < LARGE else await asyncio.to_thread(code)


def size_of(result: AppendResult) -> int:
    return sum(value.nbytes for value in result.outputs.values() if isinstance(value, np.ndarray))


class _Read(NamedTuple):
    operation: Append
    once: Once
    form: Form
    text: TextModel | None  # when the request or its reply has text


def _read(
    service: Service, request: Request, session_id: str, tenant: str, kind: type[AppendRequest], body: bytes
) -> _Read:
    """Raises WireError and its children, InvalidInput, SessionNotFound, SessionGone, KeyReused, ReplyDropped."""
    once = once_of(request, body)
    expected = parse_if_match(request.headers.get("if-match"))
    query = request.query_params.multi_items()
    read = read_append(kind, request.headers.get("content-type"), body, query)
    operation, text = append_of(service, session_id, tenant, expected, once, read)
    return _Read(operation, once, read.form, text)


def append_of(
    service: Service, session_id: str, tenant: str, expected: int | None, once: Once | None, read: AppendBody
) -> tuple[Append, TextModel | None]:
    """The operation, and what its text needs if it has any.

    Raises InvalidInput, SessionNotFound, SessionGone, KeyReused, ReplyDropped.
    """
    asked, inputs, _ = read
    lengths = asked.batch_valid_length
    text: TextModel | None = None
    if asked.token_ids is not None:
        inputs["token_ids"] = np.array(asked.token_ids, dtype=np.int64)
    if asked.text is not None or asked.messages is not None or asked.sample is not None or asked.top_logprobs:
        session = service.engine.session(session_id, tenant)
        text = service.text_model(session.model)
        spoken = asked.text is not None or asked.messages is not None
        # what was done already is not read again: its text was said to the session as it was then
        if spoken and not (once and service.engine.recalls(session_id, tenant, once, expected)):
            rows = encode_rows(asked, session, text)
            inputs["token_ids"] = pad(rows)
            if len(set(map(len, rows))) > 1:
                after = [past + len(row) for past, row in zip(session.valid_length, rows, strict=True)]
                if lengths not in (None, after):
                    raise InvalidInput("batch_valid_length", f"the text makes it {after}, got {lengths}; leave it out")
                lengths = after
                # lengths are counted from the past as it is now: an append that gets in between must not change them
                expected = session.version if expected is None else expected
    want = Want(
        logits=asked.logits,
        top_logprobs=asked.top_logprobs,
        token_logprobs=asked.token_logprobs,
        sample=None if asked.sample is None else sampling(asked.sample),
        need_weights=asked.need_weights,
        average_attn_weights=asked.average_attn_weights,
    )
    operation = Append(
        session_id,
        inputs,
        tenant,
        isinstance(asked, StepRequest),
        batch_valid_length=lengths,
        expected_version=expected,
        want=want,
        keep=not isinstance(asked, ScoreRequest),
        once=once,
    )
    return operation, text


def _write(result: AppendResult, text: TextModel | None, form: Form) -> Encoded:
    return write_reply(told_of(result), outputs_of(result, text), arrays_of(result), form)


def reply_of(result: AppendResult, text: TextModel | None) -> tuple[AppendReply, dict[str, Array]]:
    """And its arrays by name."""
    return AppendReply(outputs=Outputs(**outputs_of(result, text)), **told_of(result)), arrays_of(result)


def told_of(result: AppendResult | GenerateResult) -> dict[str, Any]:
    """The fields of an Appended: plain, since a model of them would cost as much as all the rest of a small reply."""
    return {
        "past_length": result.past_length,
        "valid_length": result.valid_length,
        "version": result.version,
        "computed": result.effort.computed,
        "reused": result.effort.reused,
        "shared": result.effort.shared,
        "timings": {"queue_ms": result.queue_ms, "compute_ms": result.compute_ms},
    }


def arrays_of(result: AppendResult) -> dict[str, Array]:
    """By name; but token_logprobs, which are told as lists of which one may be shorter and begin with null."""
    outputs = result.outputs.items()
    return {name: value for name, value in outputs if isinstance(value, np.ndarray) and name != "token_logprobs"}


def outputs_of(result: AppendResult, text: TextModel | None) -> dict[str, Any]:
    """Those fields of an Outputs that are there and no arrays. A row that appended nothing has None in the engine's
    lists."""

    def spoken(token: int | None) -> str:
        return "" if token is None or text is None else text.tokenizer.decode([token])

    outputs: dict[str, Any] = {}
    tokens: list[int | None] | None = result.outputs.get("next_token")
    if tokens is not None:
        outputs["next_token"] = tokens
        if text is not None:
            outputs["text"] = [spoken(token) for token in tokens]
    likeliest: list[list[tuple[int, float]] | None] | None = result.outputs.get("top_logprobs")
    if likeliest is not None:
        outputs["top_logprobs"] = [
            [{"token_id": token, "logprob": logprob, "text": spoken(token)} for token, logprob in row or []]
            for row in likeliest
        ]
    told = _token_logprobs(result)
    return outputs if told is None else {**outputs, "token_logprobs": told}


def _token_logprobs(result: AppendResult) -> list[list[float | None]] | None:
    told: Array | None = result.outputs.get("token_logprobs")
    if told is None:
        return None
    new = [after - before for before, after in zip(result.past_length, result.valid_length, strict=True)]
    return [
        [None if math.isnan(logprob) else logprob for logprob in row[:count].tolist()]
        for row, count in zip(told, new, strict=True)
    ]
