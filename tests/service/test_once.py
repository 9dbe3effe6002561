"""Done once, however often it is asked for: keys, versions, lost replies, failures. Every test over both kinds."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from safetensors.numpy import load

from keypast.schemas import GenerateReply, SessionView
from keypast.wire import SAFETENSORS_TYPE
from tests.fakes import FaultyQuotas
from tests.service.conftest import Running, Start, until
from tests.service.fakes import KINDS, POISON, Kind, event_data
from tests.service.raw_client import RawRequest

pytestmark = pytest.mark.anyio
DECODER = KINDS["decoder"]


def key(name: str, **headers: str) -> dict[str, str]:
    return {"idempotency-key": name, **headers}


def replayed(reply: httpx.Response) -> bool:
    return "true" in reply.headers.get_list("idempotent-replayed")


def as_raw(body: object) -> dict[str, Any]:
    """What RawRequest sends: a retry has the same bytes."""
    return {"content": json.dumps(body)}


def committed(running: Running, session_id: str) -> tuple[int, list[int]]:
    info = running.fakes.engine.session(session_id)
    return info.version, info.valid_length


async def changes(running: Running, kind: Kind) -> list[tuple[str, str, dict[str, Any]]]:
    """Every request that changes something of a session, in an order in which each may be done."""
    past = await running.client.get(f"/v1/sessions/{await running.prefilled(kind, 2)}/past")
    session_id = await running.session(kind)
    path = f"/v1/sessions/{session_id}"
    file = {"content": past.content, "headers": {"content-type": SAFETENSORS_TYPE}}
    generate = [("POST", f"{path}/generate", {"json": {"max_tokens": 3, "sample": {"temperature": 1}}})]
    return [
        ("POST", "/v1/sessions", {"json": {"model": kind.model, "labels": {"a": "b"}}}),
        ("PUT", f"{path}/past", file),
        ("POST", f"{path}/prefill", {"json": kind.json(3, 2)}),
        ("POST", f"{path}/step", kind.binary(1, 5)),
        *(generate if kind is DECODER else []),
        ("POST", f"{path}/fork", {"json": {"count": 2, "at": 4}}),
        ("POST", f"{path}/truncate", {"json": {"length": 1}}),
        ("DELETE", path, {}),
    ]


async def test_the_same_key_and_body_give_the_first_reply_again(running: Running, kind: Kind) -> None:
    for number, (method, path, body) in enumerate(await changes(running, kind)):
        headers = {**body.pop("headers", {}), **key(f"k{number}")}
        first = await running.client.request(method, path, headers=headers, **body)
        assert first.is_success, first.text
        state = running.state()
        again = await running.client.request(method, path, headers=headers, **body)
        assert (again.status_code, again.content) == (first.status_code, first.content), path
        assert (replayed(first), replayed(again)) == (False, True), path
        for name in ("etag", "location", "content-type"):
            assert first.headers.get(name) == again.headers.get(name), path
        assert running.state() == state, path


async def test_the_same_key_with_another_request_is_422(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 3)}"
    assert (await running.client.post(f"{path}/step", json=kind.json(1, 3), headers=key("k"))).is_success
    state = running.state()
    others: list[tuple[str, str, Any]] = [
        ("POST", f"{path}/step", kind.json(1, 3, poison=True)),
        ("POST", f"{path}/prefill", kind.json(1, 3)),
        ("POST", f"{path}/fork", {}),
        ("POST", f"{path}/truncate", {"length": 1}),
        ("DELETE", path, None),
    ]
    for method, other, body in others:
        reply = await running.client.request(method, other, json=body, headers=key("k"))
        assert (reply.status_code, reply.json()["code"], reply.json()["field"]) == (
            422,
            "idempotency_key_reused",
            "Idempotency-Key",
        )
    assert running.state() == state
    create = {"model": kind.model}
    assert (await running.client.post("/v1/sessions", json=create, headers=key("c"))).status_code == 201
    reply = await running.client.post("/v1/sessions", json={**create, "batch_size": 2}, headers=key("c"))
    assert (reply.status_code, reply.json()["code"]) == (422, "idempotency_key_reused")


async def test_options_in_the_query_are_part_of_the_request(running: Running) -> None:
    path = f"/v1/sessions/{await running.prefilled(KINDS['attention'], 3)}/step"
    sent = KINDS["attention"].binary(1, 3, need_weights=True, average_attn_weights=True)
    sent["headers"] |= key("k")
    first = await running.client.post(path, **sent)
    turned = await running.client.post(path, **{**sent, "params": dict(reversed(sent["params"].items()))})
    assert (first.status_code, replayed(turned), turned.content) == (200, True, first.content)
    other = await running.client.post(path, **{**sent, "params": {"need_weights": "false"}})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


async def test_a_replay_comes_in_the_form_that_it_asks_for(running: Running) -> None:
    path = f"/v1/sessions/{await running.prefilled(DECODER, 3)}/step"
    body = DECODER.json(1, 3, logits="last")
    first = await running.client.post(path, json=body, headers=key("k"))
    again = await running.client.post(path, json=body, headers=key("k", accept=SAFETENSORS_TYPE))
    assert (replayed(again), again.headers["content-type"]) == (True, SAFETENSORS_TYPE)
    assert load(again.content)["logits"].tolist() == first.json()["outputs"]["logits"]["data"]


@pytest.mark.parametrize("given", ["", "a b", "x" * 256, "ä", "a\tb"])
async def test_a_key_of_another_form_is_422(running: Running, kind: Kind, given: str) -> None:
    session_id = await running.prefilled(kind, 3)
    headers = {"idempotency-key": given.encode()}
    path = f"/v1/sessions/{session_id}"
    for method, other in (("POST", "/step"), ("DELETE", ""), ("POST", "/fork")):
        body = kind.json(1, 3) if other == "/step" else {} if other else None
        reply = await running.client.request(method, path + other, json=body, headers=headers)  # type: ignore[arg-type]
        assert (reply.status_code, reply.json()["field"]) == (422, "Idempotency-Key")
    assert committed(running, session_id) == (1, [3])


async def test_two_keys_in_one_request_are_422(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 3)}/step"
    two = [("idempotency-key", "a"), ("idempotency-key", "b")]
    assert (await running.client.post(path, json=kind.json(1, 3), headers=two)).status_code == 422
    longest = await running.client.post(path, json=kind.json(1, 3), headers=key("!~" * 127 + "x"))
    assert longest.status_code == 200


async def test_twenty_at_once_commit_once(start: Start, kind: Kind) -> None:
    running = await start(max_waiting_per_session=32)
    session_id = await running.prefilled(kind, 3)
    runner = running.fakes.runner(kind)
    runner.gate.clear()

    path, body = f"/v1/sessions/{session_id}/step", kind.json(1, 3)
    tasks = [asyncio.create_task(running.client.post(path, json=body, headers=key("k"))) for _ in range(20)]
    await until(lambda: running.fakes.engine.capacity().waiting == 20)
    other = await running.client.post(f"/v1/sessions/{session_id}/truncate", json={"length": 1}, headers=key("k"))
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused"), "also while the first waits"
    ran = len(runner.batches)
    runner.gate.set()
    replies = await asyncio.gather(*tasks)
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.content for reply in replies}) == 1
    assert sorted(map(replayed, replies)) == [False] + [True] * 19
    assert (committed(running, session_id), len(runner.batches) - ran) == ((2, [4]), 1)


async def test_more_than_may_wait_are_refused_and_commit_once(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 3)
    path = f"/v1/sessions/{session_id}/step"
    runner = running.fakes.runner(kind)
    runner.gate.clear()
    tasks = [asyncio.create_task(running.client.post(path, json=kind.json(1, 3), headers=key("k"))) for _ in range(20)]
    await until(lambda: sum(task.done() for task in tasks) == 4)
    runner.gate.set()
    replies = await asyncio.gather(*tasks)
    assert sorted(reply.status_code for reply in replies) == [200] * 16 + [429] * 4
    assert committed(running, session_id) == (2, [4])


async def test_creations_at_once_create_once(running: Running, kind: Kind) -> None:
    replies = await asyncio.gather(
        *(running.client.post("/v1/sessions", json={"model": kind.model}, headers=key("k")) for _ in range(20))
    )
    assert len({reply.json()["id"] for reply in replies}) == len(running.fakes.engine.sessions()) == 1
    assert sum(map(replayed, replies)) == 19


async def test_what_failed_is_not_remembered(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 3)
    path, runner = f"/v1/sessions/{session_id}/step", running.fakes.runner(kind)
    runner.broken = RuntimeError("once")
    first = await running.client.post(path, json=kind.json(1, 3), headers=key("k"))
    assert (first.status_code, committed(running, session_id)) == (500, (1, [3]))
    runner.broken = None
    again = await running.client.post(path, json=kind.json(1, 3), headers=key("k"))
    assert (again.status_code, replayed(again), committed(running, session_id)) == (200, False, (2, [4]))


async def test_when_the_first_fails_the_one_that_waits_runs(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 3)
    path, runner = f"/v1/sessions/{session_id}/step", running.fakes.runner(kind)
    runner.gate.clear()
    tasks = [
        asyncio.create_task(running.client.post(path, json=kind.json(1, 3, poison=poison), headers=key(name)))
        for name, poison in (("a", True), ("b", False), ("a", True), ("b", False))
    ]
    await until(lambda: running.fakes.engine.capacity().waiting == 4)
    runner.gate.set()
    replies = await asyncio.gather(*tasks)
    assert [reply.is_success for reply in replies] == [False, True, False, True]
    assert [replayed(reply) for reply in replies] == [False, False, False, True]
    assert committed(running, session_id) == (2, [4])


async def test_a_reader_who_left_before_the_schedule_leaves_the_work_to_the_retry(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 3)
    path, runner = f"/v1/sessions/{session_id}/step", running.fakes.runner(kind)
    runner.gate.clear()
    runner.entered.clear()
    runs = asyncio.create_task(running.client.post(path, json=kind.json(1, 3)))
    await asyncio.to_thread(runner.entered.wait)
    leaves = RawRequest(running.app, path, kind.json(1, 4), key("k"))
    await until(lambda: running.fakes.engine.capacity().waiting == 2)
    leaves.leave()
    await leaves.task
    retry = asyncio.create_task(running.client.post(path, **as_raw(kind.json(1, 4)), headers=key("k")))
    await until(lambda: running.fakes.engine.capacity().waiting == 3)
    runner.gate.set()
    replies = await asyncio.gather(runs, retry)
    assert [(reply.status_code, replayed(reply)) for reply in replies] == [(200, False)] * 2
    assert committed(running, session_id) == (3, [5])


async def test_a_reader_who_left_after_the_schedule_gets_the_reply_later(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 3)
    path, runner = f"/v1/sessions/{session_id}/step", running.fakes.runner(kind)
    runner.gate.clear()
    runner.entered.clear()
    leaves = RawRequest(running.app, path, kind.json(1, 3), key("k"))
    await asyncio.to_thread(runner.entered.wait)
    leaves.leave()
    retry = asyncio.create_task(running.client.post(path, **as_raw(kind.json(1, 3)), headers=key("k")))
    await until(lambda: running.fakes.engine.capacity().waiting == 2)
    runner.gate.set()
    reply = await retry
    assert (reply.status_code, replayed(reply), committed(running, session_id)) == (200, True, (2, [4]))
    await leaves.task


async def test_without_a_key_the_version_and_the_body_tell_a_retry(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 3)
    path = f"/v1/sessions/{session_id}"
    requests: list[tuple[str, Any]] = [("/step", kind.json(1, 3)), ("/truncate", {"length": 2})]
    if kind is DECODER:
        requests.insert(1, ("/generate", {"max_tokens": 2}))
    for verb, body in requests:
        expects = {"if-match": f'"{committed(running, session_id)[0]}"'}
        first = await running.client.post(path + verb, json=body, headers=expects)
        state = running.state()
        again = await running.client.post(path + verb, json=body, headers=expects)
        assert (again.status_code, again.content, replayed(again)) == (200, first.content, True)
        stale = await running.client.post(path + verb, json=body, headers={"if-match": '"0"'})
        other = await running.client.post(path + verb, content=json.dumps(body) + " ", headers=expects)
        keyed = await running.client.post(path + verb, json=body, headers=key(f"new{verb}") | expects)
        assert [reply.status_code for reply in (stale, other, keyed)] == [412] * 3
        assert running.state() == state
    unguarded = await running.client.post(f"{path}/truncate", json={"length": 2})
    assert (unguarded.status_code, replayed(unguarded)) == (200, False), "without a version it is another request"
    late = await running.client.post(path + "/step", json=kind.json(1, 3), headers={"if-match": '"1"'})
    assert late.status_code == 412, "only the last change is known without a key"


async def test_a_first_request_without_a_version_is_known_too(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 3)}/step"
    first = await running.client.post(path, json=kind.json(1, 3))
    again = await running.client.post(path, json=kind.json(1, 3), headers={"if-match": '"1"'})
    assert (replayed(again), again.content) == (True, first.content)


async def test_the_last_64_keys_are_known(running: Running, kind: Kind) -> None:
    session_id = await running.prefilled(kind, 3)
    path = f"/v1/sessions/{session_id}/truncate"
    for number in range(65):
        await running.client.post(path, json={"length": 3}, headers=key(f"k{number}"))
    second = await running.client.post(path, json={"length": 3}, headers=key("k1"))
    assert (replayed(second), second.json()["version"]) == (True, 3)
    first = await running.client.post(path, json={"length": 3}, headers=key("k0"))
    assert (replayed(first), first.json()["version"]) == (False, 67)


async def test_a_reply_too_large_to_keep_is_told_of_and_not_done_again(start: Start, kind: Kind) -> None:
    running = await start(replay_bytes_per_session=64)
    session_id = await running.prefilled(kind, 3)
    path = f"/v1/sessions/{session_id}/step"
    for headers in (key("k"), {"if-match": '"2"'}):
        past = committed(running, session_id)[1][0]
        assert (await running.client.post(path, json=kind.json(1, past), headers=headers)).status_code == 200
        before = committed(running, session_id)
        again = await running.client.post(path, json=kind.json(1, past), headers=headers)
        body = again.json()
        assert (again.status_code, body["code"], replayed(again)) == (412, "reply_dropped", False)
        assert ((body["version"], body["valid_length"]), again.headers["etag"]) == (before, f'"{before[0]}"')
        assert committed(running, session_id) == before


async def test_what_is_kept_for_retries_goes_with_the_session(running: Running, kind: Kind) -> None:
    create = {"model": kind.model, "id": "mine"}
    for _ in range(2):
        made = await running.client.post("/v1/sessions", json=create, headers=key("c"))
        assert (made.status_code, replayed(made)) == (201, False)
        first = await running.client.post("/v1/sessions/mine/prefill", json=kind.json(3), headers=key("k"))
        assert (first.status_code, replayed(first)) == (200, False)
        await running.client.delete("/v1/sessions/mine")
        gone = await running.client.post("/v1/sessions/mine/prefill", json=kind.json(3), headers=key("k"))
        assert (gone.status_code, gone.json()["reason"]) == (410, "deleted")


async def test_only_the_same_key_gets_the_receipt_again(running: Running, kind: Kind) -> None:
    path = f"/v1/sessions/{await running.prefilled(kind, 3)}"
    first = await running.client.delete(path, headers=key("d", **{"if-match": '"1"'}))
    again = await running.client.delete(path, headers=key("d", **{"if-match": '"1"'}))
    assert (again.status_code, again.json(), replayed(again)) == (200, first.json(), True)
    for headers in (key("e"), {}):
        assert (await running.client.delete(path, headers=headers)).status_code == 410


async def test_a_reply_that_could_not_be_encoded_is_made_again(running: Running) -> None:
    """The commit stands, whatever comes after it."""
    session_id = await running.prefilled(DECODER, 3)
    path, body = f"/v1/sessions/{session_id}/step", DECODER.json(1, 3, sample={})
    running.fakes.tokenizer.broken = RuntimeError("cannot be written")
    transport = httpx.ASGITransport(running.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://k") as client:
        first = await client.post(path, json=body, headers=key("k"))
    assert (first.status_code, committed(running, session_id)) == (500, (2, [4]))
    running.fakes.tokenizer.broken = None
    again = await running.client.post(path, json=body, headers=key("k"))
    assert (again.status_code, replayed(again), again.json()["outputs"]["text"]) == (200, True, ["b"])
    assert committed(running, session_id) == (2, [4])


# Text and generations: what depends on the session as it was.


async def test_ragged_text_is_replayed_though_its_lengths_have_moved(running: Running) -> None:
    session_id = await running.session("letters", batch_size=2)
    body = {"text": ["ab", "c"], "batch_valid_length": [2, 1], "sample": {}}
    for _ in range(2):
        reply = await running.client.post(f"/v1/sessions/{session_id}/prefill", json=body, headers=key("k"))
        assert (reply.status_code, reply.json()["outputs"]["text"]) == (200, ["c", "d"])
    assert (replayed(reply), committed(running, session_id)) == (True, (1, [2, 1]))


GENERATIONS: list[dict[str, Any]] = [
    {"max_tokens": 4, "logprobs": True},
    {"max_tokens": 9, "stop": "ef"},
    {"max_tokens": 9, "stop": ["e", "z"]},
    {"max_tokens": 9},
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("options", GENERATIONS)
async def test_a_generation_is_replayed_to_the_letter(running: Running, options: dict[str, Any], stream: bool) -> None:
    """Two rows that end each in its own way; the second ends by its model's end, by a stop text, or by the length."""
    running.fakes.decoder.after = {ord("z"): 256}
    session_id = await running.session("letters", batch_size=2, max_length=12)
    path = f"/v1/sessions/{session_id}"
    await running.client.post(f"{path}/prefill", json={"text": ["abc", "x"]})
    body = {**options, "stream": stream}
    first = await running.client.post(f"{path}/generate", json=body, headers=key("k"))
    before = committed(running, session_id)
    again = await running.client.post(f"{path}/generate", json=body, headers=key("k"))
    assert (first.status_code, replayed(again), committed(running, session_id)) == (200, True, before)
    assert again.text == first.text


async def test_a_character_cut_in_half_is_replayed_as_it_was(running: Running) -> None:
    running.fakes.decoder.after = {ord("c"): 0xC3, 0xC3: 0xA9, 0xA9: ord("c")}
    session_id = await running.session("letters", max_length=5)
    path = f"/v1/sessions/{session_id}"
    await running.client.post(f"{path}/prefill", json={"text": "c"})
    replies = [await running.client.post(f"{path}/generate", json={"max_tokens": 9}, headers=key("k")) for _ in "ab"]
    assert replies[0].json()["outputs"]["text"] == ["éc\N{REPLACEMENT CHARACTER}"]
    assert replies[1].text == replies[0].text


async def test_a_generation_that_failed_midway_is_not_begun_again(running: Running) -> None:
    running.fakes.decoder.after = {ord("c"): POISON}
    session_id = await running.session("letters")
    path = f"/v1/sessions/{session_id}"
    await running.client.post(f"{path}/prefill", json={"text": "a"})
    replies = [await running.client.post(f"{path}/generate", json={"max_tokens": 9}, headers=key("k")) for _ in "ab"]
    assert [replayed(reply) for reply in replies] == [False, True]
    assert replies[0].text == replies[1].text
    told = GenerateReply.model_validate_json(replies[1].content)
    assert (told.outputs.text, told.finish_reason, told.valid_length) == (["bc"], ["cancelled"], [3])
    assert committed(running, session_id) == (3, [3])


async def test_a_generation_that_fails_anywhere_is_told_to_its_last_commit(start: Start) -> None:
    """Also where it is no model that fails: an error would say that nothing was applied."""
    quotas = FaultyQuotas()
    running = await start(quotas=quotas)
    statuses = set()
    for lookup in range(1, 20):
        session_id = await running.prefilled(DECODER, 3)
        path, headers = f"/v1/sessions/{session_id}/generate", key("k")
        quotas.fail(lookup, on_engine=True)
        first = await running.client.post(path, json={"max_tokens": 4}, headers=headers)
        quotas.mend()
        version, length = committed(running, session_id)
        statuses.add((first.status_code, version > 1))
        if first.status_code == 200:
            told = first.json()
            assert (told["valid_length"], told["version"]) == (length, version)
            assert told["outputs"]["text"] == ["bcde"[: version - 1]]
            assert told["finish_reason"] == (["length"] if version == 5 else ["cancelled"])
            again = await running.client.post(path, json={"max_tokens": 4}, headers=headers)
            assert (replayed(again), again.content) == (True, first.content)
    assert statuses == {(500, False), (200, True)}


async def test_a_stream_that_failed_midway_is_told_to_its_last_commit(running: Running) -> None:
    running.fakes.decoder.after = {ord("c"): POISON}
    session_id = await running.session("letters")
    path = f"/v1/sessions/{session_id}"
    await running.client.post(f"{path}/prefill", json={"text": "a"})
    body = {"max_tokens": 9, "stream": True}
    first, again = [await running.client.post(f"{path}/generate", json=body, headers=key("k")) for _ in "ab"]
    *tokens, end, done = event_data(again.text)
    assert tokens == event_data(first.text)[:2]
    assert (end["finish_reason"], end["valid_length"], done) == (["cancelled"], [3], "[DONE]")
    assert committed(running, session_id) == (3, [3])


async def test_a_generation_with_a_key_outlives_its_reader(running: Running) -> None:
    session_id = await running.prefilled(DECODER, 3)
    running.fakes.decoder.hold(3)
    path, body = f"/v1/sessions/{session_id}/generate", {"max_tokens": 20}
    request = RawRequest(running.app, path, body, key("k"))
    await asyncio.to_thread(running.fakes.decoder.held.wait)
    request.leave()
    await request.task
    running.fakes.decoder.gate.set()
    retry = await running.client.post(path, **as_raw(body), headers=key("k"))
    assert (retry.status_code, replayed(retry), retry.json()["finish_reason"]) == (200, True, ["length"])
    assert committed(running, session_id) == (21, [23])


async def test_a_stream_with_a_key_ends_with_its_reader_and_tells_a_retry_how_far_it_came(running: Running) -> None:
    session_id = await running.prefilled(DECODER, 3)
    running.fakes.decoder.hold(3)
    path, body = f"/v1/sessions/{session_id}/generate", {"max_tokens": 20, "stream": True}
    request = RawRequest(running.app, path, body, key("k"))
    await asyncio.to_thread(running.fakes.decoder.held.wait)
    request.leave()
    await request.task
    running.fakes.decoder.gate.set()
    retry = await running.client.post(path, **as_raw(body), headers=key("k"))
    *tokens, end, _ = event_data(retry.text)
    assert (retry.status_code, replayed(retry), end["finish_reason"]) == (200, True, ["cancelled"])
    version, length = committed(running, session_id)
    assert (len(tokens), end["valid_length"], end["version"]) == (length[0] - 3, length, version)
    assert length[0] < 10


async def test_a_drain_answers_those_who_come_again(running: Running, kind: Kind) -> None:
    """503 would say that nothing was applied."""
    path = f"/v1/sessions/{await running.prefilled(kind, 3)}"
    first = await running.client.post(f"{path}/step", json=kind.json(1, 3), headers=key("k"))
    running.fakes.engine.stop()
    again = await running.client.post(f"{path}/step", json=kind.json(1, 3), headers=key("k"))
    assert (again.status_code, again.content) == (200, first.content)
    assert (await running.client.post(f"{path}/step", json=kind.json(1, 4), headers=key("l"))).status_code == 503
    SessionView.model_validate_json((await running.client.get(path)).content)
