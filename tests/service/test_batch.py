"""Many steps in one request: one batch of the model, a status an item, and nobody spoils another's."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from keypast.batch import Outcome, read_outcomes
from keypast.wire import JSON_TYPE, SAFETENSORS_TYPE, Array, dump_tensors, encode_tensor
from tests.service.conftest import Running, Start, until
from tests.service.fakes import KINDS, POISON, VOCABULARY, H, Kind
from tests.service.raw_client import RawRequest

pytestmark = pytest.mark.anyio

PATH = "/v1/batch/step"
DECODER, ATTENTION = KINDS["decoder"], KINDS["attention"]


def item(session_id: str, kind: Kind, past: int = 2, **options: object) -> dict[str, Any]:
    return {"session_id": session_id, **kind.json(1, past), **options}


async def steps(running: Running, *items: Any, key: str | None = None) -> list[dict[str, Any]]:
    headers = {} if key is None else {"idempotency-key": key}
    reply = await running.client.post(PATH, json={"items": items}, headers=headers)
    assert reply.status_code == 200, reply.text
    told: list[dict[str, Any]] = reply.json()["items"]
    return told


async def test_they_share_a_batch_and_answer_as_single_steps(running: Running, kind: Kind) -> None:
    sessions = [await running.prefilled(kind, 2) for _ in range(5)]
    twins = [await running.prefilled(kind, 2) for _ in range(5)]
    options: dict[str, Any] = {"logits": "last", "sample": {}} if kind is DECODER else {"need_weights": True}
    runner = running.fakes.runner(kind)
    before = len(runner.batches)
    told = await steps(running, *(item(session, kind, **options) for session in sessions))
    assert runner.batches[before:] == [[(2, 3)] * 5]
    for outcome, session, twin in zip(told, sessions, twins, strict=True):
        single = (await running.client.post(f"/v1/sessions/{twin}/step", json=kind.json(1, 2, **options))).json()
        timings = outcome["reply"].pop("timings")
        assert timings.keys() == single.pop("timings").keys()
        assert outcome == {"session_id": session, "status": 200, "replayed": False, "reply": single}


async def test_both_kinds_at_once(running: Running) -> None:
    sessions = [(await running.prefilled(kind, 2), kind) for kind in (DECODER, ATTENTION, DECODER)]
    told = await steps(running, *(item(session, kind) for session, kind in sessions))
    assert [(one["status"], one["reply"]["valid_length"]) for one in told] == [(200, [3])] * 3


async def test_every_item_has_its_own_end(running: Running, kind: Kind) -> None:
    good, empty, other, poisoned = [
        await running.prefilled(kind, 2),
        await running.session(kind),
        await running.prefilled(kind, 2),
        await running.prefilled(kind, 2),
    ]
    await running.session(kind, id="deleted")
    await running.client.delete("/v1/sessions/deleted")
    full = await running.prefilled(kind, 2, max_length=2)
    poison = kind.json(1, 2)
    if kind is DECODER:
        poison["token_ids"] = [[POISON]]
    else:
        poison["value"] = encode_tensor(np.full((1, 1, H), POISON, np.float32), "nested")
    items: list[tuple[Any, int, str | None]] = [
        (item(good, kind), 200, None),
        (item(empty, kind, 0), 409, "wrong_state"),
        (item("nobody", kind), 404, "session_not_found"),
        (item("deleted", kind), 410, "session_gone"),
        (item(full, kind), 422, "length_exceeded"),
        ({"session_id": poisoned, **poison}, 500, "model_failed"),
        (item(other, kind, if_match=7), 412, "moved"),
        (item(good, kind), 422, "invalid_input"),
        ({"session_id": other, **kind.json(2, 2)}, 422, "invalid_input"),
        ({"session_id": other, "nonsense": 1}, 422, "invalid_input"),
        ({**kind.json(1, 2)}, 422, "invalid_input"),
        (item("no/id at all", kind), 422, "invalid_input"),
        (5, 422, "invalid_input"),
        (None, 422, "invalid_input"),
    ]
    told = await steps(running, *(one for one, _, _ in items))
    assert [(one["status"], one.get("problem", {}).get("code")) for one in told] == [(s, c) for _, s, c in items]
    assert [one.get("session_id") for one in told][:3] == [good, empty, "nobody"]
    assert (told[6]["problem"]["version"], told[6]["problem"]["valid_length"]) == (1, [2])
    assert told[7]["problem"]["detail"].startswith("session_id: is that of item 0 already")
    assert told[5]["problem"]["instance"] == f"/v1/sessions/{poisoned}/step"
    assert "/secret" not in json.dumps(told)
    lengths = {info.id: info.valid_length for info in running.fakes.engine.sessions()}
    assert lengths == {good: [3], empty: [0], other: [2], poisoned: [2], full: [2]}


async def test_a_problem_is_that_of_the_single_step(running: Running, kind: Kind) -> None:
    session = await running.prefilled(kind, 2)
    bad = kind.json(1, 2, batch_valid_length=[9])
    single = await running.client.post(f"/v1/sessions/{session}/step", json=bad)
    (told,) = await steps(running, {"session_id": session, **bad})
    ids = (single.json().pop("request_id"), told["problem"].pop("request_id"))
    assert ids[0] != ids[1]
    assert told["problem"] == {name: value for name, value in single.json().items() if name != "request_id"}
    assert told["status"] == single.status_code == 412


async def test_if_match_guards_an_item(running: Running, kind: Kind) -> None:
    session = await running.prefilled(kind, 2)
    for version, status in ((0, 412), (1, 200), (0, 412)):
        (told,) = await steps(running, item(session, kind, past=2, if_match=version))
        assert told["status"] == status
    assert running.fakes.engine.session(session).valid_length == [3]


async def test_a_batch_that_comes_twice_is_done_once(running: Running, kind: Kind) -> None:
    """Item by item: what had been refused is tried again."""
    sessions = [await running.prefilled(kind, 2) for _ in range(2)]
    empty = await running.session(kind)
    items = [item(session, kind) for session in (*sessions, empty)]
    first = await steps(running, *items, key="k-1")
    assert [one["status"] for one in first] == [200, 200, 409]
    await running.client.post(f"/v1/sessions/{empty}/prefill", json=kind.json(2))
    again = await steps(running, *reversed(items), key="k-1")
    assert [(one["status"], one["replayed"]) for one in again] == [(200, False), (200, True), (200, True)]
    assert [one["reply"] for one in reversed(again)][:2] == [one["reply"] for one in first[:2]]
    assert [info.valid_length for info in running.fakes.engine.sessions()] == [[3]] * 3
    other = await steps(running, {**items[0], "batch_valid_length": [4]}, key="k-1")
    assert [(one["status"], one["problem"]["code"]) for one in other] == [(422, "idempotency_key_reused")]
    wrong = await running.client.post(PATH, json={"items": items}, headers={"idempotency-key": "two words"})
    assert (wrong.status_code, wrong.json()["field"]) == (422, "Idempotency-Key")


async def test_a_version_and_the_same_step_is_a_retry_too(running: Running, kind: Kind) -> None:
    session = await running.prefilled(kind, 2)
    told = [(await steps(running, item(session, kind, if_match=1)))[0] for _ in range(2)]
    assert [(one["status"], one["replayed"], one["reply"]["version"]) for one in told] == [
        (200, False, 2),
        (200, True, 2),
    ]
    assert running.fakes.engine.session(session).valid_length == [3]
    arrays = {f"0.{name}": array for name, array in kind.inputs(1, 3, 1, False).items()}
    for replayed in (False, True):
        (one,) = await outcomes(running, **file([{"session_id": session, "if_match": 2}], arrays))
        assert (one.told.status, one.told.replayed) == (200, replayed)
    assert running.fakes.engine.session(session).valid_length == [4]


@pytest.mark.parametrize(
    ("content", "status", "field"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 422, "body"),
        (b"{}", 422, "items"),
        (b'{"items": []}', 422, "items"),
        (b'{"items": {}}', 422, "items"),
        (b'{"items": 5}', 422, "items"),
        (b'{"items": [1, 2, 3, 4, 5]}', 422, "items"),
        (b'{"items": [1], "more": 2}', 422, "more"),
    ],
)
async def test_what_is_no_list_of_steps(start: Start, content: bytes, status: int, field: str | None) -> None:
    running: Running = await start(settings={"max_batch_items": 4})
    reply = await running.client.post(PATH, content=content)
    assert (reply.status_code, reply.json().get("field")) == (status, field)


async def test_media_types_methods_and_size(start: Start) -> None:
    running: Running = await start(settings={"max_body_bytes": 2000})
    wrong = await running.client.post(PATH, content=b"x", headers={"content-type": "text/plain"})
    assert wrong.status_code == 415
    got = await running.client.get(PATH)
    assert (got.status_code, got.headers["allow"]) == (405, "POST")
    assert (await running.client.post(PATH, content=b"x" * 2001)).status_code == 413


def file(items: Any, arrays: dict[str, Array], **kwargs: str) -> dict[str, Any]:
    text = np.frombuffer(json.dumps(items).encode(), np.uint8)
    headers = {"content-type": SAFETENSORS_TYPE, **kwargs}
    return {"content": dump_tensors({"items": text, **arrays}, {}), "headers": headers}


async def outcomes(running: Running, **request: Any) -> list[Outcome]:
    reply = await running.client.post(PATH, **request)
    assert reply.status_code == 200, reply.text
    return read_outcomes(reply.headers["content-type"], reply.content)


async def test_safetensors_in_and_out(running: Running) -> None:
    layers = [await running.prefilled(ATTENTION, 2) for _ in range(2)]
    words = await running.prefilled(DECODER, 2)
    tensors = ATTENTION.inputs(1, 2, 1, False)
    arrays = {f"{at}.{name}": array for at in (0, 2) for name, array in tensors.items()}
    arrays["1.token_ids"] = DECODER.inputs(1, 2, 1, False)["token_ids"].astype(np.int32)
    items = [{"session_id": layers[0]}, {"session_id": words, "logits": "last"}, {"session_id": layers[1]}]
    told = await outcomes(running, **file(items, arrays))
    assert [one.told.status for one in told] == [200] * 3
    assert [sorted(one.arrays) for one in told] == [["attn_out"], ["logits"], ["attn_out"]]
    assert told[0].arrays["attn_out"].tolist() == [[[2.5] * H]]
    assert told[1].arrays["logits"].shape == (1, 1, VOCABULARY)
    again = await running.client.post(PATH, **file(items[:1], {"0.query": tensors["query"]}, accept=JSON_TYPE))
    assert again.headers["content-type"] == JSON_TYPE
    reply = again.json()["items"][0]["reply"]
    assert "data_b64" in reply["outputs"]["attn_out"]
    assert (reply["past_length"], reply["valid_length"]) == ([3], [3]), "queries alone"


async def test_json_in_safetensors_out(running: Running) -> None:
    session = await running.prefilled(DECODER, 2)
    asked = {"json": {"items": [item(session, DECODER, logits="last")]}, "headers": {"accept": SAFETENSORS_TYPE}}
    (told,) = await outcomes(running, **asked)
    assert told.arrays["logits"].shape == (1, 1, VOCABULARY)


async def test_a_bad_tensor_is_its_own_items_alone(running: Running) -> None:
    sessions = [await running.prefilled(ATTENTION, 2) for _ in range(4)]
    tensors = ATTENTION.inputs(1, 2, 1, False)
    arrays = {f"{at}.{name}": array for at in range(4) for name, array in tensors.items()}
    arrays["1.value"] = np.full_like(tensors["value"], np.nan)
    arrays["2.nonsense"] = tensors["value"]
    items = [{"session_id": session} for session in sessions[:3]] + [{"session_id": sessions[3], "query": 5}]
    told = await outcomes(running, **file(items, arrays))
    assert [(one.told.status, one.told.problem.field if one.told.problem else None) for one in told] == [
        (200, None),
        (422, "value"),
        (422, "nonsense"),
        (422, "query"),
    ]


@pytest.mark.parametrize(
    ("items", "arrays", "field"),
    [
        ([{"session_id": "a"}], {"1.query": np.zeros(1)}, "1.query"),
        ([{"session_id": "a"}], {"query": np.zeros(1)}, "query"),
        ([{"session_id": "a"}], {"00.query": np.zeros(1)}, "00.query"),
        ([], {}, "items"),
        ({}, {}, "items"),
        ([1] * 5, {}, "items"),
    ],
)
async def test_a_file_that_is_no_list_of_steps(start: Start, items: Any, arrays: dict[str, Array], field: str) -> None:
    running: Running = await start(settings={"max_batch_items": 4})
    asked = file(items, {name: array.astype(np.float32) for name, array in arrays.items()})
    reply = await running.client.post(PATH, **asked)
    assert (reply.status_code, reply.json()["field"]) == (422, field)


@pytest.mark.parametrize(
    ("tensors", "status"),
    [
        ({}, 422),
        ({"items": np.zeros(4, np.float32)}, 422),
        ({"items": np.frombuffer(b"[nonsense", np.uint8)}, 400),
        ({"items": np.zeros((0,), np.uint8)}, 400),
    ],
)
async def test_a_file_without_a_list(running: Running, tensors: dict[str, Array], status: int) -> None:
    headers = {"content-type": SAFETENSORS_TYPE}
    reply = await running.client.post(PATH, content=dump_tensors(tensors, {}), headers=headers)
    assert (reply.status_code, reply.json()["detail"].startswith("items: ")) == (status, True)


async def test_full_queues_refuse_some_and_the_rest_go_on(start: Start) -> None:
    running: Running = await start(max_waiting=2)
    sessions = [await running.prefilled(DECODER, 2) for _ in range(4)]
    told = await steps(running, *(item(session, DECODER) for session in sessions))
    assert [one["status"] for one in told] == [200, 200, 429, 429]
    assert told[2]["problem"]["retry_after"] >= 1


async def test_a_drain_refuses_each(running: Running) -> None:
    session = await running.prefilled(DECODER, 2)
    await running.service.stop()
    (told,) = await steps(running, item(session, DECODER))
    assert (told["status"], told["problem"]["code"]) == (503, "engine_stopped")


async def test_a_reader_who_leaves_takes_along_what_is_not_scheduled(running: Running) -> None:
    first, second, busy = [await running.prefilled(DECODER, 2) for _ in range(3)]
    runner = running.fakes.decoder
    runner.entered.clear()
    runner.gate.clear()
    holding = asyncio.create_task(running.client.post(f"/v1/sessions/{busy}/step", json=DECODER.json(1, 2)))
    await asyncio.to_thread(runner.entered.wait)
    request = RawRequest(running.app, PATH, {"items": [item(first, DECODER), item(second, DECODER)]})
    await until(lambda: running.fakes.engine.capacity().waiting == 3)
    request.leave()
    await asyncio.sleep(0.1)
    runner.gate.set()
    assert (await holding).status_code == 200
    await asyncio.wait_for(request.task, 10)
    await until(lambda: running.fakes.engine.idle)
    assert [running.fakes.engine.session(session).valid_length for session in (first, second)] == [[2], [2]]
    assert request.status == 0


async def test_what_runs_when_the_reader_leaves_commits(running: Running) -> None:
    first, second = [await running.prefilled(DECODER, 2) for _ in range(2)]
    runner = running.fakes.decoder
    runner.entered.clear()
    runner.gate.clear()
    request = RawRequest(running.app, PATH, {"items": [item(first, DECODER), item(second, DECODER)]})
    await asyncio.to_thread(runner.entered.wait)
    request.leave()
    await asyncio.sleep(0.1)
    runner.gate.set()
    await asyncio.wait_for(request.task, 10)
    assert [running.fakes.engine.session(session).valid_length for session in (first, second)] == [[3], [3]]


async def test_what_nobody_foresaw_is_told_without_a_word(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    session = await running.prefilled(DECODER, 2)
    running.fakes.decoder.broken = RuntimeError("at /secret/path")
    (told,) = await steps(running, item(session, DECODER))
    assert told["status"] == 500
    assert "secret" not in json.dumps(told)


async def test_text_samples_and_large_replies(start: Start) -> None:
    running: Running = await start(blocks=256)
    sessions = [await running.prefilled(DECODER, 2) for _ in range(40)]
    items = [{"session_id": session, "text": "a", "sample": {}, "logits": "last"} for session in sessions]
    told = await steps(running, *items)
    assert {tuple(one["reply"]["outputs"]["text"]) for one in told} == {("b",)}
    assert all(one["reply"]["outputs"]["logits"]["shape"] == [1, 1, VOCABULARY] for one in told)
