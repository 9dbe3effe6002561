"""Every place where a count or a position goes, and what may not stand there: refused, and nothing is changed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest

from keypast.wire import SAFETENSORS_TYPE, digest, dump_tensors
from tests.service.conftest import Running
from tests.service.fakes import KINDS, H

pytestmark = pytest.mark.anyio

LENGTH = 6
VERSION = 1
NAN = float("nan")
VALUES: list[Any] = [-1, 0, 1, LENGTH, LENGTH + 1, 2**31, 2**63, 1.5, "5", True, None, NAN]
DECODER, ATTENTION = KINDS["decoder"], KINDS["attention"]


@dataclass(frozen=True)
class Place:
    """`request` of a session's path and a value; `right`: the values that may stand there."""

    request: Callable[[str, Any], httpx.Request]
    right: tuple[Any, ...]
    kind: str = "decoder"

    def is_right(self, value: Any) -> bool:
        """Told apart as JSON tells them: 1 is not true, and not 1.0."""
        return any(type(value) is type(right) and value == right for right in self.right)


def sent(method: str, path: str, body: Any, **headers: str) -> httpx.Request:
    """NaN is written as Python and many others do."""
    content = None if body is None else json.dumps(body)
    return httpx.Request(method, f"http://k{path}", content=content, headers=headers)


def create(field: str) -> Callable[[str, Any], httpx.Request]:
    return lambda path, value: sent("POST", "/v1/sessions", {"model": "letters", field: value})


def post(verb: str, **fields: Any) -> Callable[[str, Any], httpx.Request]:
    """The value stands where a field says `Ellipsis`."""

    def put(part: Any, value: Any) -> Any:
        if part is ...:
            return value
        if isinstance(part, dict):
            return {name: put(own, value) for name, own in part.items()}
        return [put(own, value) for own in part] if isinstance(part, list) else part

    return lambda path, value: sent("POST", f"{path}/{verb}", put(fields, value))


def tensor_step(part: str) -> Callable[[str, Any], httpx.Request]:
    """A step whose query has the value in its shape or its data."""

    def request(path: str, value: Any) -> httpx.Request:
        body = ATTENTION.json(1, LENGTH)
        shape, data = ([1, value, H], [0.0] * H) if part == "shape" else ([1, 1, H], [value, 0, 0, 0])
        return sent("POST", f"{path}/step", {**body, "query": {"dtype": "float32", "shape": shape, "data": data}})

    return request


def mask(path: str, value: Any) -> httpx.Request:
    body = ATTENTION.json(1, LENGTH)
    tensor = {"dtype": "uint8", "shape": [1, 1, LENGTH + 1], "data": [value] * (LENGTH + 1)}
    return sent("POST", f"{path}/score", {**body, "attention_mask": tensor})


def if_match(method: str, verb: str, body: Any) -> Callable[[str, Any], httpx.Request]:
    return lambda path, value: sent(method, f"{path}{verb}", body, **{"if-match": f'"{json.dumps(value)}"'})


def asked(name: str, **more: str) -> Callable[[str, Any], httpx.Request]:
    """An option of a safetensors body, which is a query parameter."""

    def request(path: str, value: Any) -> httpx.Request:
        content = dump_tensors(DECODER.inputs(1, LENGTH, 1, False), {})
        params = {name: json.dumps(value), **more}
        headers = {"content-type": SAFETENSORS_TYPE}
        return httpx.Request("POST", f"http://k{path}/score", content=content, params=params, headers=headers)

    return request


def listing(path: str, value: Any) -> httpx.Request:
    return httpx.Request("GET", "http://k/v1/sessions", params={"limit": json.dumps(value)})


def cursor(path: str, value: Any) -> httpx.Request:
    return httpx.Request("GET", "http://k/v1/sessions", params={"cursor": json.dumps(value)})


def last_event(path: str, value: Any) -> httpx.Request:
    headers = {"last-event-id": f"0123abcd-{json.dumps(value)}"}
    return httpx.Request("HEAD", "http://k/v1/events", headers=headers)


def patched(field: str) -> Callable[[str, Any], httpx.Request]:
    return lambda path, value: sent("PATCH", path, {field: value})


def imported(path: str, value: Any) -> httpx.Request:
    """Into a session that is not empty: a file that is wrong is refused for what is wrong with it (422), and only one
    that is right for the session's state (409)."""
    fits = type(value) is int and abs(value) < 2**31
    lengths = np.array([value], np.int32) if fits else np.array([LENGTH], np.int64)
    past = np.zeros((1, 1, 8, LENGTH), np.float16)
    tensors = {"key_past.0": past, "value_past.0": past.swapaxes(2, 3), "batch_valid_length": lengths}
    tensors["token_ids"] = np.zeros((1, LENGTH), np.int64)
    about = {"format": "keypast-past/1", "kind": "decoder", "fingerprint": "sha256:0", "digest": digest(tensors)}
    headers = {"content-type": SAFETENSORS_TYPE}
    return httpx.Request("PUT", f"http://k{path}/past", content=dump_tensors(tensors, about), headers=headers)


STEP = {"token_ids": [[97]]}
PLACES: dict[str, Place] = {
    "batch_size": Place(create("batch_size"), (1, LENGTH, LENGTH + 1)),
    "max_length": Place(create("max_length"), (1, LENGTH, LENGTH + 1, None)),
    "ttl_seconds": Place(create("ttl_seconds"), (1, LENGTH, LENGTH + 1, 1.5, None)),
    "pinned": Place(create("pinned"), (True,)),
    "id": Place(create("id"), ("5", None)),
    "patched ttl_seconds": Place(patched("ttl_seconds"), (1, LENGTH, LENGTH + 1, 1.5, None)),
    "patched pinned": Place(patched("pinned"), (True, None)),
    "token_ids": Place(post("prefill", token_ids=[[...]]), (0, 1, LENGTH, LENGTH + 1)),
    "token_ids of a step": Place(post("step", token_ids=[[...]]), (0, 1, LENGTH, LENGTH + 1)),
    "token_ids of a score": Place(post("score", token_ids=[[...]]), (0, 1, LENGTH, LENGTH + 1)),
    "a row of token_ids": Place(post("prefill", token_ids=[...]), ()),
    "all token_ids": Place(post("prefill", token_ids=...), ()),
    "batch_valid_length of a prefill": Place(post("prefill", **STEP, batch_valid_length=[...]), (LENGTH + 1,)),
    "batch_valid_length of a step": Place(post("step", **STEP, batch_valid_length=[...]), (LENGTH + 1,)),
    "batch_valid_length of a score": Place(post("score", **STEP, batch_valid_length=[...]), (LENGTH + 1,)),
    "batch_valid_length itself": Place(post("step", **STEP, batch_valid_length=...), (None,)),
    "batch_valid_length of tensors": Place(
        lambda path, value: sent("POST", f"{path}/step", ATTENTION.json(1, LENGTH, batch_valid_length=[value])),
        (LENGTH + 1,),
        "attention",
    ),
    "top_logprobs": Place(post("step", **STEP, top_logprobs=...), (0, 1, LENGTH, LENGTH + 1)),
    "top_logprobs in the query": Place(asked("top_logprobs"), (0, 1, LENGTH, LENGTH + 1)),
    "batch_valid_length in the query": Place(
        lambda path, value: asked("batch_valid_length")(path, [value]), (LENGTH + 1,)
    ),
    "top_k": Place(post("step", **STEP, sample={"top_k": ...}), (0, 1, LENGTH, LENGTH + 1)),
    "seed": Place(post("step", **STEP, sample={"seed": ...}), (0, 1, LENGTH, LENGTH + 1, 2**31, None)),
    "max_tokens": Place(post("generate", max_tokens=...), (1, LENGTH, LENGTH + 1)),
    "count": Place(post("fork", count=...), (1, LENGTH, LENGTH + 1)),
    "at": Place(post("fork", at=...), (0, 1, LENGTH, None)),
    "at a row": Place(post("fork", at=[...]), (0, 1, LENGTH)),
    "length": Place(post("truncate", length=...), (0, 1, LENGTH)),
    "length a row": Place(post("truncate", length=[...]), (0, 1, LENGTH)),
    "a shape": Place(tensor_step("shape"), (1,), "attention"),
    "data": Place(tensor_step("data"), (-1, 0, 1, LENGTH, LENGTH + 1, 2**31, 2**63, 1.5), "attention"),
    "a mask": Place(mask, (0, 1), "attention"),
    "limit": Place(listing, (1, LENGTH, LENGTH + 1)),
    "cursor": Place(cursor, ()),
    "Last-Event-ID": Place(last_event, (0, 1, LENGTH, LENGTH + 1, 2**31)),
    "batch_valid_length of a file": Place(imported, ()),
    **{
        f"If-Match of {verb or method}": Place(if_match(method, verb, body), (VERSION,))
        for method, verb, body in (
            ("POST", "/prefill", STEP),
            ("POST", "/step", STEP),
            ("POST", "/score", STEP),
            ("POST", "/generate", {"max_tokens": 1}),
            ("POST", "/fork", {}),
            ("POST", "/truncate", {"length": 1}),
            ("GET", "/past", None),
            ("PATCH", "", {"labels": {}}),
            ("DELETE", "", None),
        )
    },
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
async def test_what_is_no_number_there_is_refused(running: Running, place: Place) -> None:
    path = f"/v1/sessions/{await running.prefilled(KINDS[place.kind], LENGTH)}"
    before = running.state()
    for value in VALUES:
        if not place.is_right(value):
            reply = await running.client.send(place.request(path, value))
            assert 400 <= reply.status_code < 500, (value, reply.text)
            assert reply.status_code != 404, "the place is there"
            assert running.state() == before, value
    for value in place.right:
        fresh = f"/v1/sessions/{await running.prefilled(KINDS[place.kind], LENGTH)}"
        reply = await running.client.send(place.request(fresh, value))
        assert reply.is_success, (value, reply.text)


ITEM_PLACES: dict[str, tuple[Callable[[Any], dict[str, Any]], tuple[Any, ...]]] = {
    "if_match": (lambda value: {"if_match": value}, (VERSION, None)),
    "token_ids": (lambda value: {"token_ids": [[value]]}, (0, 1, LENGTH, LENGTH + 1)),
    "batch_valid_length": (lambda value: {"batch_valid_length": [value]}, (LENGTH + 1,)),
    "top_logprobs": (lambda value: {"top_logprobs": value}, (0, 1, LENGTH, LENGTH + 1)),
    "session_id": (lambda value: {"session_id": value}, ()),
}


@pytest.mark.parametrize(("fields", "right"), ITEM_PLACES.values(), ids=ITEM_PLACES.keys())
async def test_an_item_of_a_batch_is_refused_alone(
    running: Running, fields: Callable[[Any], dict[str, Any]], right: tuple[Any, ...]
) -> None:
    """Among two that are not."""
    place = Place(lambda path, value: sent("POST", path, None), right)
    session = await running.prefilled(DECODER, LENGTH)
    others = [await running.prefilled(DECODER, 2) for _ in range(2)]
    good = [{"session_id": other, **STEP} for other in others]
    for at, value in enumerate(value for value in VALUES if not place.is_right(value)):
        items = [good[0], {"session_id": session, **STEP, **fields(value)}, good[1]]
        reply = await running.client.post("/v1/batch/step", content=json.dumps({"items": items}))
        told = [item["status"] for item in reply.json()["items"]]
        assert (told[0], told[2], 400 <= told[1] < 500) == (200, 200, True), (value, reply.text)
        assert running.fakes.engine.session(session).valid_length == [LENGTH]
        assert running.fakes.engine.session(others[0]).valid_length == [3 + at]
    for value in right:
        fresh = await running.prefilled(DECODER, LENGTH)
        items = [{"session_id": fresh, **STEP, **fields(value)}]
        reply = await running.client.post("/v1/batch/step", json={"items": items})
        assert [item["status"] for item in reply.json()["items"]] == [200], (value, reply.text)


@pytest.mark.parametrize("value", [value for value in VALUES if value != [1]], ids=repr)
async def test_a_list_of_steps_is_a_list(running: Running, value: Any) -> None:
    before = running.state()
    reply = await running.client.post("/v1/batch/step", content=json.dumps({"items": value}))
    assert (reply.status_code, reply.json()["field"]) == (422, "items")
    assert running.state() == before
