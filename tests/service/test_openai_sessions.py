"""Turns of sessions that OpenAI's clients take, and take again when a reply was lost."""

import asyncio
from typing import Any

import httpx
import pytest

from keypast.openai_schemas import ChatReply, CompletionReply
from keypast.wire import load_tensors
from tests.service.conftest import Running, Start
from tests.service.fakes import POISON, event_data
from tests.service.raw_client import RawRequest
from tests.service.tenants import KEYS, as_tenant

pytestmark = pytest.mark.anyio

IN = 257
RETRY = {"x-stainless-retry-count": "1"}  # as OpenAI's clients say it
Body = dict[str, Any]


@pytest.fixture
async def running(start: Start) -> Running:
    """Replies begin with h."""
    service: Running = await start()
    service.fakes.decoder.after = {IN: ord("h")}
    return service


async def turn(running: Running, session_id: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    """Of a chat, or of completions."""
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    asked = {"session_id": session_id, "max_tokens": 3, "temperature": 0, **body}
    reply = await running.client.post(path, json=asked, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply


def user(text: str) -> Body:
    return {"role": "user", "content": text}


async def text_of(running: Running, session_id: str) -> str:
    """What is in the session; control tokens are #."""
    length = running.fakes.engine.session(session_id).valid_length[0]
    past = await running.client.get(f"/v1/sessions/{session_id}/past")
    tokens = load_tensors(past.content).arrays["token_ids"][0, :length].tolist()
    return "".join(chr(token) if token < 256 else "#" for token in tokens)


async def test_a_completion_goes_on_in_its_session(running: Running) -> None:
    session_id = await running.session("letters")
    first = CompletionReply.model_validate_json((await turn(running, session_id, prompt="ab")).content)
    assert (first.choices[0].text, first.session_id) == ("cde", session_id)
    second = CompletionReply.model_validate_json((await turn(running, session_id, prompt="xx", echo=True)).content)
    assert second.choices[0].text == "xxyz{"
    assert second.usage is not None
    assert second.usage.model_dump() == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    third = await turn(running, session_id, prompt="")
    assert third.json()["choices"][0]["text"] == "|}~", "nothing to append: it goes on"
    assert await text_of(running, session_id) == "abcdexxyz{|}~"


@pytest.mark.parametrize("where", ["body", "header", "both"])
async def test_a_chat_goes_on_in_its_session(running: Running, where: str) -> None:
    session_id = await running.session("letters")
    named: Body = {} if where == "header" else {"session_id": session_id}
    headers = {} if where == "body" else {"X-Session-ID": session_id}
    usages = []
    for content in ("a", "b"):
        body = {"messages": [user(content)], "max_tokens": 3, "temperature": 0, **named}
        reply = await running.client.post("/v1/chat/completions", json=body, headers=headers)
        told = ChatReply.model_validate_json(reply.content)
        assert (told.choices[0].message.content, told.session_id) == ("hij", session_id)
        assert told.usage.prompt_tokens_details is not None
        usages.append((told.usage.prompt_tokens, told.usage.prompt_tokens_details.cached_tokens))
    assert await text_of(running, session_id) == "#user: a##hij##user: b##hij"
    assert usages == [(10, 0), (24, 13)]


async def test_a_conversation_that_is_sent_whole_is_computed_once(running: Running) -> None:
    """As clients do that know nothing of sessions, and name one by a header: it is made, and kept in step."""
    messages = [user("a")]
    cached = []
    for content in ("b", "c", "d"):
        body = {"messages": messages, "max_tokens": 3, "temperature": 0}
        reply = await running.client.post("/v1/chat/completions", json=body, headers={"X-Session-ID": "mine"})
        told = reply.json()
        cached.append((told["usage"]["prompt_tokens"], told["usage"]["prompt_tokens_details"]["cached_tokens"]))
        messages = [*messages, told["choices"][0]["message"], user(content)]
    assert await text_of(running, "mine") == "#user: a##assistant: hij##user: b##assistant: hij##user: c##hij"
    assert cached[0] == (10, 0)
    assert cached[1][1] == 10, "this template tells a reply otherwise than it asks for it: only that is told again"
    assert cached[2][1] == cached[1][0]
    info = running.fakes.engine.session("mine")
    assert info.ttl_seconds == 3600
    stateless = await running.client.post("/v1/chat/completions", json={**body, "messages": messages})
    assert stateless.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == cached[2][0]


async def test_another_conversation_than_the_sessions_is_refused(running: Running) -> None:
    session_id = await running.session("letters")
    await turn(running, session_id, messages=[user("a")])
    await turn(running, session_id, messages=[user("b")])
    before = running.state()
    body = {"session_id": session_id, "messages": [user("x"), {"role": "assistant", "content": "hij"}, user("b")]}
    reply = await running.client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["code"], reply.headers["x-should-retry"]) == (409, "wrong_state", "false")
    assert running.state() == before


async def test_which_session_may_be_named(start: Start) -> None:
    running = await start(settings={"keys": KEYS})
    made = await running.client.post("/v1/sessions", json={"model": "letters", "id": "mine"}, headers=as_tenant("a"))
    assert made.status_code == 201
    rows = await running.client.post("/v1/sessions", json={"model": "letters", "batch_size": 2}, headers=as_tenant("a"))
    layer = await running.client.post("/v1/sessions", json={"model": "echo"}, headers=as_tenant("a"))
    cases: list[tuple[str, Body, dict[str, str], int]] = [
        ("b", {"session_id": "mine"}, {}, 404),
        ("a", {"session_id": "mine"}, {"X-Session-ID": "other"}, 422),
        ("a", {"session_id": "mine", "model": "echo"}, {}, 422),
        ("a", {"session_id": rows.json()["id"]}, {}, 422),
        ("a", {"session_id": layer.json()["id"]}, {}, 422),
        ("a", {}, {"X-Session-ID": "../x"}, 422),
        ("a", {}, {"X-Session-ID": "mine", "n": "1"}, 200),
        ("a", {"n": 2}, {"X-Session-ID": "mine"}, 422),
        ("a", {"max_tokens": 0}, {"X-Session-ID": "mine"}, 422),
        ("a", {"model": "nothing"}, {"X-Session-ID": "new"}, 404),
        ("a", {"model": "echo"}, {"X-Session-ID": "new"}, 422),
        ("b", {}, {"X-Session-ID": "mine"}, 200),
    ]
    for tenant, body, headers, status in cases:
        asked = {"prompt": "a", **body}
        reply = await running.client.post("/v1/completions", json=asked, headers=headers | as_tenant(tenant))
        assert reply.status_code == status, (body, headers, reply.text)
    assert [info.id for info in running.fakes.engine.sessions("b")] == ["mine"], "each tenant has one of its own"
    await running.client.delete("/v1/sessions/mine", headers=as_tenant("b"))
    gone = await running.client.post(
        "/v1/completions", json={"prompt": "a"}, headers={"X-Session-ID": "mine", **as_tenant("b")}
    )
    assert (gone.status_code, gone.json()["reason"]) == (410, "deleted")


# Once


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("first", "then"),
    [({"idempotency-key": "k"},) * 2, ({"x-stainless-retry-count": "0"}, RETRY)],
    ids=["key", "retry"],
)
async def test_a_turn_that_is_sent_again_is_taken_once(
    running: Running, first: dict[str, str], then: dict[str, str], streamed: bool
) -> None:
    session_id = await running.session("letters")
    body = {"messages": [user("a")], "stream": streamed}
    replies = [await turn(running, session_id, headers, **body) for headers in (first, then, then)]
    assert ["idempotent-replayed" in reply.headers for reply in replies] == [False, True, True]
    assert await text_of(running, session_id) == "#user: a##hij"
    told = [event_data(reply.text)[:-1] if streamed else [reply.json()] for reply in replies]
    for events in told:
        for event in events:
            del event["created"]
    assert told[0] == told[1] == told[2]


async def test_the_same_words_are_another_turn_unless_they_are_a_retry(running: Running) -> None:
    session_id = await running.session("letters")
    body = {"messages": [user("yes")]}
    for expected, headers in ((1, {}), (2, {}), (2, RETRY), (2, RETRY), (3, {"x-stainless-retry-count": "0"})):
        await turn(running, session_id, headers, **body)
        assert (await text_of(running, session_id)).count("yes") == expected
    await turn(running, session_id, RETRY, messages=[user("no")])
    assert (await text_of(running, session_id)).count("no") == 1, "the first try never came"
    await turn(running, session_id, RETRY, **body)
    assert (await text_of(running, session_id)).count("yes") == 4, "not the last turn"


@pytest.mark.parametrize(
    ("count", "again"), [("1", True), ("9" * 5000, True), ("0", False), ("00", False), ("-1", False), ("x", False)]
)
async def test_what_says_that_it_is_a_retry(running: Running, count: str, again: bool) -> None:
    session_id = await running.session("letters")
    await turn(running, session_id, prompt="a")
    reply = await turn(running, session_id, {"x-stainless-retry-count": count}, prompt="a")
    assert ("idempotent-replayed" in reply.headers) == again
    assert await text_of(running, session_id) == ("abcd" if again else "abcdabcd")


async def test_a_key_stands_for_one_turn(running: Running) -> None:
    session_id = await running.session("letters")
    await turn(running, session_id, {"idempotency-key": "k"}, prompt="a")
    body = {"session_id": session_id, "prompt": "b"}
    other = await running.client.post("/v1/completions", json=body, headers={"idempotency-key": "k"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


async def test_a_reply_outlives_its_reader_who_tries_again(running: Running) -> None:
    session_id = await running.session("letters")
    running.fakes.decoder.hold(3)
    body = {"session_id": session_id, "prompt": "a", "max_tokens": 9, "temperature": 0}
    request = RawRequest(running.app, "/v1/completions", body)
    await asyncio.to_thread(running.fakes.decoder.held.wait)
    request.leave()
    await request.task
    retry = RawRequest(running.app, "/v1/completions", body, RETRY)
    await asyncio.sleep(0.01)
    running.fakes.decoder.gate.set()
    await retry.task
    assert (retry.status, CompletionReply.model_validate_json(retry.body).choices[0].text) == (200, "bcdefghij")
    assert await text_of(running, session_id) == "abcdefghij"


@pytest.mark.parametrize("batch", [1, 2, 4])
async def test_a_stream_that_was_cut_off_goes_on_where_it_was(running: Running, batch: int) -> None:
    session_id = await running.session("letters")
    body = {"session_id": session_id, "prompt": "a", "max_tokens": 9, "stop": "hx", "stream": True, "temperature": 0}
    for cut in range(2):
        running.fakes.decoder.held.clear()
        running.fakes.decoder.hold(batch)
        request = RawRequest(running.app, "/v1/completions", body, RETRY if cut else {})
        await asyncio.to_thread(running.fakes.decoder.held.wait)
        request.leave()
        await request.task
        running.fakes.decoder.gate.set()
    before = await text_of(running, session_id)
    retry = RawRequest(running.app, "/v1/completions", body, RETRY)
    await retry.task
    *chunks, done = event_data(retry.body.decode())
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "bcdefghij"
    assert (chunks[-1]["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    assert len(before) < 10
    assert await text_of(running, session_id) == "abcdefghij"


async def test_a_turn_that_fails_before_its_first_token_was_never_taken(running: Running) -> None:
    session_id = await running.session("letters")
    running.fakes.decoder.after |= {ord("m"): POISON}
    body = {"session_id": session_id, "prompt": "m", "temperature": 0, "max_tokens": 2}
    failed = await running.client.post("/v1/completions", json=body)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "model_failed")
    assert await text_of(running, session_id) == ""
    running.fakes.decoder.after = {}
    again = await running.client.post("/v1/completions", json=body, headers=RETRY)
    assert again.json()["choices"][0]["text"] == "no"
    assert await text_of(running, session_id) == "mno"


async def test_a_turn_that_fails_later_tells_what_is_in_the_session(running: Running) -> None:
    """An error status would be tried again, and these tokens are there."""
    session_id = await running.session("letters")
    running.fakes.decoder.after |= {ord("c"): POISON}
    for headers in ({}, RETRY):
        reply = (await turn(running, session_id, headers, prompt="a", max_tokens=9, ignore_eos=True)).json()
        assert (reply["choices"][0]["text"], reply["choices"][0]["finish_reason"]) == ("bc", "cancelled")
        assert (reply["problem"]["status"], reply["problem"]["code"]) == (500, "model_failed")
        assert await text_of(running, session_id) == "abc"
    stream = await turn(running, session_id, messages=[user("a")], stream=True)
    assert event_data(stream.text)[0]["choices"][0]["delta"]["content"] == "h"
