"""Every refusal: its status, its body, and that nothing changed."""

import base64
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from engine import errors
from keypast.schemas import Code, Problem
from keypast.wire import SAFETENSORS_TYPE, dump_tensors
from service.errors import ENGINE_ERRORS, PROBLEM_TYPE, problem_of
from tests.service.conftest import Running, Start
from tests.service.fakes import KINDS, VOCABULARY, H, Kind, nested

pytestmark = pytest.mark.anyio

DECODER, ATTENTION = KINDS["decoder"], KINDS["attention"]
TENSOR = {"dtype": "float32", "shape": [1, 1, H], "data": [0, 0, 0, 0]}


def refused(reply: httpx.Response, status: int, code: str, field: str | None = None) -> Problem:
    """The problem of a refusal, whose every member is checked."""
    assert (reply.status_code, reply.headers["content-type"]) == (status, PROBLEM_TYPE), reply.text
    problem = Problem.model_validate_json(reply.content)
    assert (problem.status, problem.code, problem.field) == (status, code, field), problem.detail
    assert problem.request_id == reply.headers["x-request-id"]
    assert problem.instance == reply.request.url.path
    assert problem.error.message == problem.detail
    assert (problem.error.code, problem.error.param) == (code, field)
    assert ("retry-after" in reply.headers) == (status in (429, 503))
    assert reply.headers.get("x-should-retry") == ("false" if status == 409 else None)
    for secret in ("/secret", "0x7f", "Traceback", "/work"):
        assert secret not in reply.text
    return problem


# ---- the body --------------------------------------------------------------------------------------------------------

MALFORMED = {
    "empty": b"",
    "cut off": b'{"token_ids": [[1',
    "bad UTF-8": b'{"text": "\xff\xfe"}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
    "two values": b"{} {}",
    "deep": nested(100_000),
    "deep in what is ignored": b'{"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("verb", ["/prefill", "/step", "/score", "/generate", "/fork", "/truncate", ""])
async def test_malformed_json_is_400(running: Running, body: bytes, verb: str) -> None:
    session_id = await running.prefilled(DECODER, 3)
    before = running.state()
    path = f"/v1/sessions/{session_id}{verb}" if verb else "/v1/sessions"
    reply = await running.client.post(path, content=body, headers={"content-type": "application/json"})
    refused(reply, 400, "malformed")
    assert running.state() == before


INVALID: dict[str, tuple[object, str]] = {
    "unknown field": ({"token_ids": [[1]], "hello": 1}, "hello"),
    "not an object": ([1], "body"),
    "nothing to append": ({}, "token_ids"),
    "no rows": ({"token_ids": []}, "token_ids"),
    "0 positions": ({"token_ids": [[]]}, "token_ids[0]"),
    "ragged": ({"token_ids": [[1], [1, 2]]}, "token_ids"),
    "2**63": ({"token_ids": [[2**63]]}, "token_ids[0][0]"),
    "a number of 5,000 digits": ({"token_ids": [[int("9" * 4000)]]}, "token_ids[0][0]"),
    "negative": ({"token_ids": [[-1]]}, "token_ids[0][0]"),
    "beyond the vocabulary": ({"token_ids": [[VOCABULARY]]}, "token_ids"),
    "a float": ({"token_ids": [[1.5]]}, "token_ids[0][0]"),
    "true": ({"token_ids": [[True]]}, "token_ids[0][0]"),
    "too many rows": ({"token_ids": [[1], [2]]}, "token_ids"),
    "two sources": ({"token_ids": [[1]], "text": "a"}, "body"),
    "empty text": ({"text": ""}, "text"),
    "too many texts": ({"text": ["a", "b"]}, "text"),
    "tensors": ({"query": TENSOR, "key": TENSOR, "value": TENSOR}, "query"),
    "length below the past": ({"token_ids": [[1]], "batch_valid_length": [2]}, "batch_valid_length"),
    "too many lengths": ({"token_ids": [[1]], "batch_valid_length": [4, 4]}, "batch_valid_length"),
    "NaN": ({"token_ids": [[1]], "sample": {"temperature": float("nan")}}, "sample.temperature"),
    "Infinity": ({"token_ids": [[1]], "sample": {"temperature": float("inf")}}, "sample.temperature"),
    "out of range": ({"token_ids": [[1]], "sample": {"top_p": 0}}, "sample.top_p"),
    "not an output": ({"token_ids": [[1]], "need_weights": True}, "need_weights"),
}


@pytest.mark.parametrize(("body", "field"), INVALID.values(), ids=INVALID.keys())
async def test_an_invalid_append_to_a_decoder_is_422(running: Running, body: object, field: str) -> None:
    session_id = await running.prefilled(DECODER, 3)
    before = running.state()
    reply = await running.client.post(f"/v1/sessions/{session_id}/prefill", content=json.dumps(body))
    refused(reply, 422, "invalid_input", field)
    assert running.state() == before


def tensors(**changed: object) -> dict[str, Any]:
    """A step of the attention kind at length 3, some of its fields changed."""
    return {**ATTENTION.json(1, 3), **changed}


INVALID_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": (tensors(query={**TENSOR, "data": [float("nan"), 0, 0, 0]}), "query"),
    "Infinity": (tensors(value={**TENSOR, "data": [float("inf"), 0, 0, 0]}), "value"),
    "not a number": (tensors(key={**TENSOR, "data": ["1", 0, 0, 0]}), "key"),
    "2**63 in float16": (tensors(key={**TENSOR, "dtype": "float16", "data": [2**63, 0, 0, 0]}), "key"),
    "too few numbers": (tensors(key={**TENSOR, "data": [0]}), "key"),
    "no data": (tensors(key={"dtype": "float32", "shape": [1, 1, H]}), "key"),
    "not base64": (tensors(key={"dtype": "float32", "shape": [1, 1, H], "data_b64": "!" * 24}), "key"),
    "hidden size": (tensors(query={**TENSOR, "shape": [1, 1, 1], "data": [0]}), "query"),
    "rank": (tensors(query={**TENSOR, "shape": [H]}), "query"),
    "dtype": (tensors(query={**TENSOR, "dtype": "int32"}), "query"),
    "unknown dtype": (tensors(query={**TENSOR, "dtype": "float64"}), "query.dtype"),
    "a shape beyond memory": (tensors(query={**TENSOR, "shape": [2**30, 2**30, 2**30]}), "query"),
    "0 positions": (tensors(query={**TENSOR, "shape": [1, 0, H], "data": []}), "query"),
    "n differs": (tensors(key={**TENSOR, "shape": [1, 2, H], "data": [0] * 8}), "key"),
    "mask of the wrong length": (ATTENTION.json(1, 9), "attention_mask"),
    "mask values": (
        tensors(attention_mask={"dtype": "uint8", "shape": [1, 1, 4], "data": [2, 1, 1, 1]}),
        "attention_mask",
    ),
    "no mask on prefill": (
        {key: value for key, value in tensors().items() if key != "attention_mask"},
        "attention_mask",
    ),
    "nothing": ({}, "query"),
    "a key without its value": ({"key": TENSOR}, "value"),
    "a value without its key": (tensors(key=None), "key"),
    "queries alone without a mask": ({"query": TENSOR}, "attention_mask"),
    "a mask without queries": (tensors(query=None), "query"),
    "a mask for more than the past": (
        {name: tensors()[name] for name in ("query", "attention_mask")},
        "attention_mask",
    ),
    "key and value disagree": ({"key": TENSOR, "value": {**TENSOR, "shape": [1, 2, H], "data": [0] * 8}}, "value"),
    "nothing appended": ({"key": TENSOR, "value": TENSOR, "batch_valid_length": [3]}, "batch_valid_length"),
    "text": ({"text": "a"}, "text"),
    "messages": ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
    "token ids": (tensors(token_ids=[[1]]), "token_ids"),
    "sample": (tensors(sample={}), "sample"),
}


@pytest.mark.parametrize(("body", "field"), INVALID_TENSORS.values(), ids=INVALID_TENSORS.keys())
async def test_an_invalid_append_to_attention_is_422(running: Running, body: dict[str, Any], field: str) -> None:
    session_id = await running.prefilled(ATTENTION, 3)
    before = running.state()
    reply = await running.client.post(f"/v1/sessions/{session_id}/prefill", content=json.dumps(body))
    refused(reply, 422, "invalid_input", field)
    assert running.state() == before


INVALID_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "two queries": ({"query": {**TENSOR, "shape": [1, 2, H], "data": [0] * 8}}, "query"),
    "two keys": (
        {"query": TENSOR} | {name: {**TENSOR, "shape": [1, 2, H], "data": [0] * 8} for name in ("key", "value")},
        "key",
    ),
    "keys alone": ({"key": TENSOR, "value": TENSOR}, "query"),
    "a key without its value": ({"query": TENSOR, "key": TENSOR}, "value"),
    "a mask of the wrong length": (tensors(key=None, value=None), "attention_mask"),
}


@pytest.mark.parametrize(("body", "field"), INVALID_STEPS.values(), ids=INVALID_STEPS.keys())
async def test_an_invalid_step_of_attention_is_422(running: Running, body: dict[str, Any], field: str) -> None:
    session_id = await running.prefilled(ATTENTION, 3)
    before = running.state()
    reply = await running.client.post(f"/v1/sessions/{session_id}/step", content=json.dumps(body))
    refused(reply, 422, "invalid_input", field)
    assert running.state() == before


@pytest.mark.parametrize("verb", ["step", "prefill"])
async def test_queries_alone_need_a_past_of_the_length_they_name(running: Running, verb: str) -> None:
    mask = {"dtype": "bool", "shape": [1, 1, 3], "data": [1, 1, 1]}
    body = {"query": TENSOR, "attention_mask": mask}
    empty, past = await running.session("echo"), await running.prefilled(ATTENTION, 3)
    before = running.state()
    refused(await running.client.post(f"/v1/sessions/{empty}/{verb}", json=body), 409, "wrong_state")
    moved = {**body, "batch_valid_length": [4]}
    problem = refused(await running.client.post(f"/v1/sessions/{past}/{verb}", json=moved), 412, "moved")
    assert (problem.valid_length, problem.version) == ([3], 1)
    assert running.state() == before


def safetensors(**arrays: Any) -> bytes:
    return dump_tensors(arrays, {})


BAD_FILES: dict[str, tuple[bytes, int, str | None]] = {
    "empty": (b"", 400, None),
    "not a file": (b"hello, this is no safetensors file", 400, None),
    "a header beyond the body": (b"\xff" * 8 + b"{}", 400, None),
    "cut off": (safetensors(query=np.zeros((1, 1, H), np.float32))[:-1], 400, None),
    "a deep header": ((10_000).to_bytes(8, "little") + b"[" * 10_000, 400, None),
    "NaN": (safetensors(query=np.full((1, 1, H), np.nan, np.float32)), 422, "query"),
    "a stranger": (safetensors(stranger=np.zeros(1, np.float32)), 422, "stranger"),
    "dtype": (safetensors(query=np.zeros((1, 1, H), np.int32)), 422, "query"),
}


@pytest.mark.parametrize(("body", "status", "field"), BAD_FILES.values(), ids=BAD_FILES.keys())
async def test_bad_safetensors(running: Running, body: bytes, status: int, field: str | None) -> None:
    session_id = await running.prefilled(ATTENTION, 3)
    before = running.state()
    path, headers = f"/v1/sessions/{session_id}/prefill", {"content-type": SAFETENSORS_TYPE}
    reply = await running.client.post(path, content=body, headers=headers)
    if status == 400:
        refused(reply, 400, "malformed")
    else:
        assert (reply.status_code, reply.json()["field"] in (field, "key")) == (422, True)
    assert running.state() == before


async def test_query_parameters_are_known_or_refused(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.session(kind)}/prefill"
    reply = await running.client.post(path, **kind.binary(3, 0, stranger=1))
    refused(reply, 422, "invalid_input", "stranger")
    reply = await running.client.post(path, json=kind.json(3), params={"logits": "last"})
    refused(reply, 422, "invalid_input", "logits")


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "nonsense"])
@pytest.mark.parametrize("verb", ["/prefill", "/step", "/score", "/generate", "/fork", "/truncate", ""])
async def test_other_media_types_are_415(running: Running, media: str, verb: str) -> None:
    session_id = await running.session("letters")
    before = running.state()
    path = f"/v1/sessions/{session_id}{verb}" if verb else "/v1/sessions"
    reply = await running.client.post(path, content=b"{}", headers={"content-type": media})
    refused(reply, 415, "unsupported_media_type")
    assert running.state() == before


@pytest.mark.parametrize("verb", ["/generate", "/fork", "/truncate", ""])
async def test_safetensors_where_only_json_is_read_is_415(running: Running, verb: str) -> None:
    path = f"/v1/sessions/{await running.session('letters')}{verb}" if verb else "/v1/sessions"
    reply = await running.client.post(path, content=b"{}", headers={"content-type": SAFETENSORS_TYPE})
    refused(reply, 415, "unsupported_media_type")


async def test_a_long_body_is_413_declared_or_not(start: Start) -> None:
    running = await start(settings={"max_body_bytes": 2000})
    path = f"/v1/sessions/{await running.session('letters')}/prefill"
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1000
            yield b" " * 1000

    for body in (b" " * 2001, endless()):
        reply = await running.client.post(path, content=body)
        refused(reply, 413, "body_too_large")
        assert reply.headers["connection"] == "close"
    assert read == 3000, "not read further than the limit"
    assert (await running.client.post(path, json=DECODER.json(3))).status_code == 200


# ---- the session -----------------------------------------------------------------------------------------------------


async def test_unknown_sessions_and_routes_are_404(running: Running, kind: Kind) -> None:
    for session_id in ("nobody", "a" * 500, "%2e%2e", "ü"):
        path = f"/v1/sessions/{session_id}"
        for verb, body in (
            ("/prefill", kind.json(1)),
            ("/step", kind.json(1)),
            ("/score", kind.json(1)),
            ("/fork", {}),
            ("/truncate", {"length": 0}),
        ):
            refused(await running.client.post(path + verb, json=body), 404, "session_not_found")
        refused(await running.client.get(path), 404, "session_not_found")
        refused(await running.client.delete(path), 404, "session_not_found")
    refused(await running.client.post("/v1/sessions", json={"model": "nobody"}), 404, "model_not_found")
    for path in ("/nothing", "/v1/sessions/", "/v1/sessions/a/b/c"):
        refused(await running.client.get(path), 404, "not_found")


async def test_other_methods_are_405_with_all_that_are_allowed(running: Running) -> None:
    allowed = {
        "/v1/sessions": "HEAD, GET, POST",
        "/v1/sessions/a": "HEAD, GET, PATCH, DELETE",
        "/v1/sessions/a/step": "POST",
        "/v1/sessions/a/score": "POST",
        "/v1/batch/step": "POST",
        "/v1/events": "HEAD, GET",
    }
    for path, methods in {**allowed, "/livez": "HEAD, GET", "/v1/sessions/a/past": "HEAD, GET, PUT"}.items():
        reply = await running.client.request("TRACE", path)
        refused(reply, 405, "method_not_allowed")
        assert reply.headers["allow"] == methods


async def test_409_is_not_to_be_sent_again(running: Running, kind: Kind) -> None:
    session_id = await running.session(kind, id="mine")
    before = running.state()
    refused(await running.client.post(f"/v1/sessions/{session_id}/step", json=kind.json(1)), 409, "wrong_state")
    again = await running.client.post("/v1/sessions", json={"model": kind.model, "id": "mine"})
    refused(again, 409, "session_exists")
    assert running.state() == before


async def test_generate_needs_a_past_and_a_decoder(running: Running) -> None:
    empty, tensors = await running.session("letters"), await running.prefilled(ATTENTION, 3)
    before = running.state()
    for stream in (False, True):
        body = {"stream": stream}
        refused(await running.client.post(f"/v1/sessions/{empty}/generate", json=body), 409, "wrong_state")
        refused(await running.client.post(f"/v1/sessions/{tensors}/generate", json=body), 422, "invalid_input", "model")
    stop = await running.client.post(f"/v1/sessions/{tensors}/generate", json={"stop": "a"})
    refused(stop, 422, "invalid_input", "stop")
    assert running.state() == before


async def test_410_for_every_verb(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 3)}"
    await running.client.delete(path)
    bodies = {
        "/prefill": kind.json(1),
        "/step": kind.json(1, 3),
        "/score": kind.json(1, 3),
        "/fork": {},
        "/truncate": {"length": 0},
        "/generate": {},
    }
    for verb, body in bodies.items():
        problem = refused(await running.client.post(path + verb, json=body), 410, "session_gone")
        assert problem.reason == "deleted"


async def test_longer_than_max_length_has_a_code_of_its_own(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.session(kind, max_length=4)}/prefill"
    before = running.state()
    refused(await running.client.post(path, json=kind.json(5)), 422, "length_exceeded", next(iter(kind.json(5))))
    assert running.state() == before


async def test_a_step_of_two_positions(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 3)}/step"
    refused(await running.client.post(path, json=kind.json(2, 3)), 422, "invalid_input", next(iter(kind.json(2))))


async def test_a_full_pool_is_429_after_the_wait(start: Start, kind: Kind) -> None:
    running = await start(blocks=4, wait_seconds=0.05)
    await running.prefilled(kind, 12)
    path = f"/v1/sessions/{await running.session(kind)}/prefill"
    before = running.state()
    refused(await running.client.post(path, json=kind.json(5)), 429, "pool_exhausted")
    assert running.state() == before


async def test_a_failing_model_is_500_and_the_session_as_before(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 3)
    before = running.state()
    reply = await running.client.post(f"/v1/sessions/{session_id}/prefill", json=kind.json(2, 3, poison=True))
    refused(reply, 500, "model_failed")
    assert running.state() == before


BAD_SESSIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({}, "model"),
    "id": ({"model": "echo", "id": "a/b"}, "id"),
    "no rows": ({"model": "echo", "batch_size": 0}, "batch_size"),
    "too many rows": ({"model": "echo", "batch_size": 1025}, "batch_size"),
    "true rows": ({"model": "echo", "batch_size": True}, "batch_size"),
    "too long": ({"model": "echo", "max_length": 101}, "max_length"),
    "ttl": ({"model": "echo", "ttl_seconds": 0}, "ttl_seconds"),
    "a stranger": ({"model": "echo", "stranger": 1}, "stranger"),
}


@pytest.mark.parametrize(("body", "field"), BAD_SESSIONS.values(), ids=BAD_SESSIONS.keys())
async def test_an_invalid_session_is_422(running: Running, body: dict[str, Any], field: str) -> None:
    refused(await running.client.post("/v1/sessions", json=body), 422, "invalid_input", field)
    assert running.fakes.engine.sessions() == []


@pytest.mark.parametrize(
    ("verb", "body", "field"),
    [
        ("/truncate", {}, "length"),
        ("/truncate", {"length": 4}, "length"),
        ("/truncate", {"length": [1, 1]}, "length"),
        ("/truncate", {"length": -1}, "length"),
        ("/fork", {"count": 0}, "count"),
        ("/fork", {"at": 4}, "at"),
        ("/fork", {"at": [1, 1]}, "at"),
    ],
)
async def test_an_invalid_change_is_422(running: Running, verb: str, body: dict[str, Any], field: str) -> None:
    session_id = await running.prefilled(DECODER, 3)
    before = running.state()
    refused(await running.client.post(f"/v1/sessions/{session_id}{verb}", json=body), 422, "invalid_input", field)
    assert running.state() == before


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"state": "closed"}, "state"),
        ({"stranger": "1"}, "stranger"),
        ({"cursor": "nonsense!"}, "cursor"),
        ({"cursor": "bm9uc2Vuc2U="}, "cursor"),
        ({"cursor": base64.b64encode(b"nan").decode()}, "cursor"),
    ],
)
async def test_an_invalid_listing_is_422(running: Running, query: dict[str, str], field: str) -> None:
    refused(await running.client.get("/v1/sessions", params=query), 422, "invalid_input", field)


@pytest.mark.parametrize("value", ["3", 'W/"3"', '"3", "4"', '"x"', '"99999999999999999999"'])
async def test_an_if_match_that_is_no_version_is_422(running: Running, kind: Kind, value: str) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 3)}/step"
    reply = await running.client.post(path, json=kind.json(1, 3), headers={"if-match": value})
    refused(reply, 422, "invalid_input", "If-Match")


# ---- the table -------------------------------------------------------------------------------------------------------


def leaves(kind: type[errors.EngineError]) -> Iterator[type[errors.EngineError]]:
    for child in kind.__subclasses__():
        yield child
        yield from leaves(child)


def test_every_engine_error_has_a_status_and_a_code() -> None:
    told_by_its_children = {errors.Refused}
    assert set(ENGINE_ERRORS) == set(leaves(errors.EngineError)) - told_by_its_children
    assert len({code for _, code in ENGINE_ERRORS.values()}) == len(ENGINE_ERRORS), "one code a refusal"


def test_an_error_that_nobody_foresaw_says_nothing_of_itself() -> None:
    problem = problem_of(RuntimeError("/secret/path"))
    assert (problem.status, problem.code) == (500, Code.INTERNAL)
    assert "/secret" not in problem.model_dump_json()
