"""What OpenAI's clients are answered: completions, chats, tokens; on sessions that are theirs, or gone afterwards."""

import asyncio
import json
from random import Random
from typing import Any

import pytest
from pydantic import BaseModel

from engine.config import Quota
from keypast.openai_schemas import (
    ChatChunk,
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tests.service.conftest import Running, Start, until
from tests.service.fakes import END, POISON, event_data
from tests.service.raw_client import RawRequest
from tests.service.tenants import KEYS, as_tenant

pytestmark = pytest.mark.anyio

IN = 257  # where a reply begins
Body = dict[str, Any]


async def completion(running: Running, headers: dict[str, str] | None = None, **body: Any) -> CompletionReply:
    reply = await running.client.post("/v1/completions", json={"temperature": 0, **body}, headers=headers)
    assert reply.status_code == 200, reply.text
    return CompletionReply.model_validate_json(reply.content)


async def chat(
    running: Running, text: str | list[Body], headers: dict[str, str] | None = None, **body: Any
) -> ChatReply:
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    asked = {"messages": messages, "max_tokens": 3, "temperature": 0, **body}
    reply = await running.client.post("/v1/chat/completions", json=asked, headers=headers)
    assert reply.status_code == 200, reply.text
    return ChatReply.model_validate_json(reply.content)


@pytest.fixture
async def running(start: Start) -> Running:
    """Replies begin with h."""
    service: Running = await start()
    service.fakes.decoder.after = {IN: ord("h")}
    return service


def tokens(usage: Any) -> tuple[int, int, int]:
    """Of the prompt, of the completion, and those that were not computed."""
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens


# Completions


@pytest.mark.parametrize(
    ("prompt", "texts", "usage"),
    [
        ("ab", ["cde"], (2, 3)),
        (["ab", "x"], ["cde", "yz{"], (3, 6)),
        ([97, 98], ["cde"], (2, 3)),
        ([[97, 98], [120]], ["cde", "yz{"], (3, 6)),
    ],
)
async def test_every_form_of_a_prompt(running: Running, prompt: Any, texts: list[str], usage: tuple[int, int]) -> None:
    for n in (1, 2):
        reply = await completion(running, model="letters", prompt=prompt, max_tokens=3, n=n)
        assert [choice.text for choice in reply.choices] == [text for text in texts for _ in range(n)]
        assert [choice.index for choice in reply.choices] == list(range(n * len(texts)))
        assert {choice.finish_reason for choice in reply.choices} == {"length"}
        assert reply.usage is not None
        assert tokens(reply.usage)[:2] == (usage[0], usage[1] * n)
        assert (reply.object, reply.model, reply.id[:5]) == ("text_completion", "letters", "cmpl-")
    assert running.fakes.engine.sessions() == []


async def test_the_text_is_that_of_a_native_generation(running: Running) -> None:
    running.fakes.decoder.after |= {ord("d"): 0xC3, 0xC3: 0xA9, 0xA9: ord("x"), ord("z"): END}
    path = f"/v1/sessions/{await running.session('letters')}"
    await running.client.post(f"{path}/prefill", json={"text": "ab"})
    for options in ({"max_tokens": 3}, {"max_tokens": 9}, {"max_tokens": 9, "stop": "éx"}):
        fork = (await running.client.post(f"{path}/fork", json={})).json()["sessions"][0]["id"]
        native = (await running.client.post(f"/v1/sessions/{fork}/generate", json=options)).json()
        (choice,) = (await completion(running, prompt="ab", **options)).choices
        assert [choice.text] == native["outputs"]["text"]
        assert [choice.finish_reason] == native["finish_reason"]


async def test_the_defaults_are_openais(running: Running) -> None:
    reply = await running.client.post("/v1/completions", json={"prompt": "a", "stop": None, "n": None, "user": "x"})
    assert len(reply.json()["choices"][0]["text"]) == 16
    whole = await running.client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "a", "name": "b"}], "unknown": {"x": 1}}
    )
    assert whole.json()["usage"]["total_tokens"] == 100, "a chat goes on to the model's max_length"


async def test_echo_and_logprobs_tell_of_the_prompt_too(running: Running) -> None:
    (choice,) = (await completion(running, prompt="abx", max_tokens=2, echo=True, logprobs=2)).choices
    assert choice.text == "abxyz"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list("abxyz")
    assert choice.logprobs.token_logprobs == [None, 0.0, -1.0, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.top_logprobs == [
        None,
        {"b": 0.0, "c": -1.0},
        {"x": 0.0, "y": -1.0},
        {"y": 0.0, "z": -1.0},
        {"z": 0.0, "{": -1.0},
    ]
    (scored,) = (await completion(running, prompt=[[97, 98]], max_tokens=0, echo=True, logprobs=1)).choices
    assert (scored.text, scored.finish_reason) == ("ab", "length")
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs == [None, 0.0]
    for n, prompt in ((2, ["a", "b"]), (1, "a")):
        echoed = await completion(running, prompt=prompt, max_tokens=1, echo=True, n=n)
        assert [choice.text for choice in echoed.choices] == ["ab", "ab", "bc", "bc"][: 4 if n == 2 else 1]
    (plain,) = (await completion(running, prompt="a", max_tokens=2, logprobs=0)).choices
    assert plain.logprobs is not None
    assert plain.logprobs.top_logprobs == [{"b": -0.5}, {"c": -0.5}]


async def test_each_of_n_draws_by_a_seed_of_its_own(running: Running) -> None:
    await completion(running, prompt="a", max_tokens=1, n=3, seed=7)
    assert sorted(running.fakes.decoder.seeds) == [7, 8, 9]
    running.fakes.decoder.seeds.clear()
    for _ in "ab":
        await completion(running, prompt="a", max_tokens=1)
    await completion(running, prompt="a", max_tokens=1, seed=-1)
    assert len(set(running.fakes.decoder.seeds)) == 3, "one left out is drawn anew"


# Chats


async def test_a_chat_is_the_models_template_and_its_reply(running: Running) -> None:
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "y"}]
    for content in ("hey", parts):
        reply = await chat(running, [{"role": "developer", "content": "s"}, {"role": "user", "content": content}])
        assert reply.choices[0].message.model_dump() == {"role": "assistant", "content": "hij"}
        assert (reply.choices[0].finish_reason, reply.object, reply.id[:9]) == (
            "length",
            "chat.completion",
            "chatcmpl-",
        )
        assert tokens(reply.usage)[:2] == (len("#system: s#") + len("#user: hey#") + 1, 3)
    fed = [token for batch in running.fakes.decoder.fed for token in batch]
    assert bytes(token for token in fed if token < 256).startswith(b"system: suser: hey")


async def test_what_a_chat_may_ask(running: Running) -> None:
    reply = await chat(running, "a", max_completion_tokens=2, n=2, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in reply.choices] == ["hi", "hi"]
    assert reply.choices[1].logprobs is not None
    told = reply.choices[1].logprobs.content[0]
    assert (told.token, told.logprob, told.bytes) == ("h", -0.5, [104])
    assert [(each.token, each.logprob) for each in told.top_logprobs] == [("h", 0.0), ("i", -1.0)]
    (stopped,) = (await chat(running, "a", stop=["l", "k"], max_tokens=9)).choices
    assert (stopped.message.content, stopped.finish_reason) == ("hij", "stop")
    running.fakes.decoder.after |= {ord("j"): END, END: ord("x")}
    assert (await chat(running, "a", max_tokens=9)).choices[0].message.content == "hij"
    assert (await chat(running, "a", max_tokens=5, ignore_eos=True)).choices[0].message.content == "hijx"


# Streams


async def stream(running: Running, path: str, body: Body, headers: dict[str, str] | None = None) -> list[Any]:
    reply = await running.client.post(path, json={"temperature": 0, "stream": True, **body}, headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = event_data(reply.text)
    assert events.pop() == "[DONE]"
    return events


@pytest.mark.parametrize("options", [{"stop": "fz"}, {"stop": "e"}, {"n": 2}, {"logprobs": 1}, {"echo": True}])
async def test_a_streamed_completion_is_the_whole_one(running: Running, options: Body) -> None:
    body = {"prompt": ["ab", "x"], "max_tokens": 4, **options}
    whole = await completion(running, **body)
    chunks = [CompletionReply.model_validate(event) for event in await stream(running, "/v1/completions", body)]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        told = [token for part in own if part.logprobs is not None for token in part.logprobs.tokens]
        assert told == (choice.logprobs.tokens if choice.logprobs is not None else [])


async def test_a_streamed_chat_and_its_usage(running: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    messages = [{"role": "user", "content": "a"}]
    body = {"messages": messages, "max_tokens": 3, "stream_options": options, "logprobs": True}
    events = await stream(running, "/v1/chat/completions", body)
    assert events[0]["choices"][0]["finish_reason"] is None, "it is there"
    *chunks, last = [ChatChunk.model_validate(event) for event in events]
    deltas = [chunk.choices[0].delta.model_dump(exclude_none=True) for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": "h"}, {"content": "i"}, {"content": "j"}, {}]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "length"]
    told = [chunk.choices[0].logprobs for chunk in chunks]
    assert [each.content[0].token for each in told if each is not None] == ["h", "i", "j"]
    usages = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert usages == [1, 2, 3, 3]
    assert (last.choices, tokens(last.usage)) == ([], (len("#user: a#") + 1, 3, 0))


async def test_an_error_amid_a_stream_is_its_last_event(running: Running) -> None:
    running.fakes.decoder.after |= {ord("i"): POISON}
    before = running.state()
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "ignore_eos": True}
    *chunks, error = await stream(running, "/v1/chat/completions", body)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["h", "i"]
    assert (error["error"]["code"], error["error"]["type"], error["status"]) == ("model_failed", "server_error", 500)
    reply = await running.client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "model_failed")
    assert running.state() == before


async def test_silence_is_broken_by_pings(start: Start) -> None:
    running = await start(settings={"ping_seconds": 0.02})
    running.fakes.decoder.gate.clear()
    body = {"prompt": "a", "max_tokens": 1, "stream": True}
    asked = asyncio.create_task(running.client.post("/v1/completions", json=body))
    await asyncio.sleep(0.1)
    running.fakes.decoder.gate.set()
    text = (await asked).text
    assert text.startswith(": ping\n\n: ping\n\n")
    assert event_data(text)[0]["choices"][0]["text"] == "b"


# What a request leaves behind


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_reader_who_leaves_leaves_nothing(running: Running, streamed: bool, n: int) -> None:
    before = running.state()
    for hold in (1, 4):
        running.fakes.decoder.held.clear()
        running.fakes.decoder.hold(hold)
        body = {"prompt": ["a", "bcd"], "max_tokens": 50, "n": n, "stream": streamed}
        request = RawRequest(running.app, "/v1/completions", body)
        await asyncio.to_thread(running.fakes.decoder.held.wait)
        request.leave()
        await request.task
        assert running.fakes.engine.sessions() == [], "even while the model runs"
        running.fakes.decoder.gate.set()
        await until(lambda: running.state() == before)


async def test_many_at_once_some_of_whom_leave(start: Start) -> None:
    running = await start(blocks=500)
    before = running.state()
    requests = []
    for i in range(40):
        body = {
            "prompt": "abcdefgh"[: 1 + i % 8],
            "max_tokens": 12,
            "n": 1 + i % 3,
            "stream": i % 2 == 0,
            "temperature": 0,
        }
        requests.append(RawRequest(running.app, "/v1/completions", body))
        await asyncio.sleep(0.002)
        if i % 5 == 4:
            requests[i - 2].leave()
    for i, request in enumerate(requests):
        await request.task
        if i % 5 == 2:
            continue
        assert request.status == 200
        told = request.body.decode()
        if i % 2 == 0:
            parts = [choice for event in event_data(told)[:-1] for choice in event["choices"]]
        else:
            parts = json.loads(told)["choices"]
        for choice in range(1 + i % 3):
            first = ord("a") + 1 + i % 8
            text = "".join(part["text"] for part in parts if part["index"] == choice)
            assert text == "".join(map(chr, range(first, first + 12)))
    await until(lambda: running.state() == before)


async def test_a_refusal_midway_leaves_nothing(start: Start) -> None:
    running = await start(quotas={"few": Quota(sessions=3), "a": Quota(concurrent_appends=2)}, settings={"keys": KEYS})
    before = running.state()
    gate = running.fakes.decoder.gate
    for tenant, body in (
        ("few", {"prompt": "ab", "n": 4}),
        ("few", {"prompt": ["a"] * 4}),
        ("a", {"prompt": ["a"] * 4}),
    ):
        gate.clear()  # what was taken must not end before the rest comes
        asyncio.get_running_loop().call_later(0.1, gate.set)
        reply = await running.client.post("/v1/completions", json=body, headers=as_tenant(tenant))
        assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
        assert running.fakes.engine.sessions(None) == []
        await until(gate.is_set)
    await until(lambda: running.state() == before)
    assert (await completion(running, as_tenant("few"), prompt="ab", n=3)).choices[2].text.startswith("c")
    assert running.state() == before, "nor does one that is answered"


async def test_open_streams_are_bounded(start: Start) -> None:
    running = await start(settings={"max_streams": 1})
    running.fakes.decoder.gate.clear()
    body = {"prompt": "a", "max_tokens": 2, "stream": True}
    first = asyncio.create_task(running.client.post("/v1/completions", json=body))
    await asyncio.to_thread(running.fakes.decoder.entered.wait)
    second = await running.client.post("/v1/completions", json=body)
    assert (second.status_code, second.json()["code"]) == (429, "queue_full")
    running.fakes.decoder.gate.set()
    assert (await first).status_code == 200
    assert (await running.client.post("/v1/completions", json=body)).status_code == 200


# What others have computed


async def test_a_prompt_begins_with_what_its_tenant_has_of_it(start: Start) -> None:
    running = await start(settings={"keys": KEYS})
    session = await running.client.post("/v1/sessions", json={"model": "letters"}, headers=as_tenant("a"))
    path = session.headers["location"]
    await running.client.post(f"{path}/prefill", json={"text": "abcdefg"}, headers=as_tenant("a"))
    before = running.fakes.engine.session(path.rpartition("/")[2], "a")
    cached = {}
    for tenant in "ab":
        for n in (1, 2):
            reply = await completion(running, as_tenant(tenant), prompt="abcdefxyz", max_tokens=3, n=n)
            assert [choice.text for choice in reply.choices] == ["{|}"] * n
            cached[tenant, n] = tokens(reply.usage)[2]
    assert cached == {("a", 1): 6, ("a", 2): 8, ("b", 1): 0, ("b", 2): 8}
    echoed = await completion(running, as_tenant("a"), prompt="abcdefxyz", max_tokens=1, echo=True, logprobs=0)
    assert tokens(echoed.usage)[2] == 0, "what is told of the prompt must be computed"
    now = running.fakes.engine.session(before.id, "a")
    assert (now.version, now.valid_length, now.last_used_at) == (
        before.version,
        before.valid_length,
        before.last_used_at,
    )
    assert [info.id for info in running.fakes.engine.sessions("a")] == [before.id]


async def test_a_stateless_conversation_is_not_computed_twice(running: Running) -> None:
    first = await completion(running, prompt="abc", max_tokens=4)
    again = await completion(running, prompt="abc" + first.choices[0].text + "xyz", max_tokens=2)
    assert (tokens(first.usage)[2], tokens(again.usage)[2]) == (0, 7)
    messages: list[Body] = [{"role": "user", "content": "a"}]
    told = await chat(running, messages)
    messages += [told.choices[0].message.model_dump(), {"role": "user", "content": "b"}]
    assert tokens((await chat(running, messages)).usage)[2] == tokens(told.usage)[0]


async def test_reuse_may_be_off(start: Start) -> None:
    running = await start(settings={"prefix_reuse": False})
    await running.client.post(f"/v1/sessions/{await running.session('letters')}/prefill", json={"text": "abc"})
    for _ in "ab":
        assert tokens((await completion(running, prompt="abcd")).usage)[2] == 0


# Limits and refusals


REFUSED: dict[str, tuple[str, Body, int, str | None]] = {
    "no prompt": ("completions", {}, 422, "prompt"),
    "an empty one": ("completions", {"prompt": ""}, 422, "prompt"),
    "no prompts": ("completions", {"prompt": []}, 422, "prompt"),
    "one that is empty": ("completions", {"prompt": ["a", ""]}, 422, "prompt"),
    "a wrong token": ("completions", {"prompt": [5, 259]}, 422, "prompt"),
    "a negative token": ("completions", {"prompt": [-1]}, 422, "prompt"),
    "a long one": ("completions", {"prompt": "a" * 101}, 422, "prompt"),
    "too many": ("completions", {"prompt": ["a"] * 65, "n": 2}, 422, "n"),
    "n": ("completions", {"prompt": "a", "n": 129}, 422, "n"),
    "no n": ("chat/completions", {"n": 0}, 422, "n"),
    "logprobs": ("completions", {"prompt": "a", "logprobs": 21}, 422, "logprobs"),
    "top_logprobs": ("chat/completions", {"logprobs": True, "top_logprobs": 21}, 422, "top_logprobs"),
    "top_logprobs alone": ("chat/completions", {"top_logprobs": 2}, 422, "body"),
    "stops": ("completions", {"prompt": "a", "stop": ["a"] * 17}, 422, "stop"),
    "an empty stop": ("chat/completions", {"stop": ""}, 422, "stop"),
    "a temperature": ("chat/completions", {"temperature": -1}, 422, "temperature"),
    "a penalty": ("chat/completions", {"presence_penalty": 0.5}, 422, "body"),
    "tools": ("chat/completions", {"tools": [{"type": "function"}]}, 422, "body"),
    "best_of": ("completions", {"prompt": "a", "best_of": 3}, 422, "body"),
    "a format": ("chat/completions", {"response_format": {"type": "json_object"}}, 422, "response_format.type"),
    "echo in a stream": ("completions", {"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, 422, "body"),
    "no messages": ("chat/completions", {"messages": []}, 422, "messages"),
    "a role": ("chat/completions", {"messages": [{"role": "x", "content": "a"}]}, 422, "messages[0].role"),
    "a picture": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        422,
        "messages[0].content",
    ),
    "an unknown model": ("completions", {"prompt": "a", "model": "x"}, 404, None),
    "one without text": ("completions", {"prompt": "a", "model": "echo"}, 422, "model"),
    "an unknown session": ("completions", {"prompt": "a", "session_id": "x"}, 404, None),
    "n in a session": ("completions", {"prompt": "a", "session_id": "x", "n": 2}, 422, "n"),
    "no session id": ("completions", {"prompt": "a", "session_id": "../x"}, 422, "session_id"),
}


@pytest.mark.parametrize(("path", "body", "status", "field"), REFUSED.values(), ids=REFUSED.keys())
async def test_what_is_refused_is_refused_before_any_work(
    running: Running, path: str, body: Body, status: int, field: str | None
) -> None:
    before = running.state()
    asked = {"messages": [{"role": "user", "content": "a"}], **body} if path == "chat/completions" else body
    reply = await running.client.post(f"/v1/{path}", json=asked)
    assert (reply.status_code, reply.json()["error"]["param"] if field else None) == (status, field), reply.text
    assert reply.json()["error"]["message"]
    assert running.state() == before
    assert running.fakes.decoder.batches == []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'{"x": ' + b"[" * 5000, b'{"x": {' + b",".join(b'"%d": 1' % i for i in range(70_000)) + b"}}"],
    ids=["none", "a list", "deep", "many names"],
)
async def test_what_is_not_looked_at_is_bounded_too(running: Running, path: str, body: bytes) -> None:
    reply = await running.client.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == (422 if body == b"[]" else 400)


@pytest.mark.parametrize(
    ("seed", "status"),
    [(str(2**63 - 1), 200), (str(-(2**63)), 200), ("1" + "0" * 400, 200), ("1" * 5000, 400), ("1.5", 422)],
)
async def test_any_whole_number_is_a_seed(running: Running, seed: str, status: int) -> None:
    body = f'{{"prompt": "a", "max_tokens": 1, "seed": {seed}}}'
    reply = await running.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert all(0 <= used < 2**63 for used in running.fakes.decoder.seeds)


VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        -1,
        2**40,
        1e300,
        -0.0,
        0.5,
        "",
        "a",
        "é\ud800",
        "<|in|>",
        [],
        [[]],
        [1],
        ["a", ["b"]],
        {},
    ),
    *({"a": 1}, [{}], [None], [[1], [2, 300]], [{"role": "user", "content": "a"}], [{"role": "user"}]),
    *([{"role": "assistant", "content": [{"type": "text", "text": "x"}]}], {"include_usage": 3}, {"type": "text"}),
]


async def test_nothing_that_a_field_may_hold_is_the_services_fault(running: Running) -> None:
    random = Random(0)
    models: dict[str, type[BaseModel]] = {
        "/v1/completions": CompletionRequest,
        "/v1/chat/completions": ChatRequest,
        "/tokenize": TokenizeRequest,
        "/detokenize": DetokenizeRequest,
    }
    before, seen = running.state(), set()
    for _ in range(1200):
        path, model = random.choice(list(models.items()))
        names = random.choices(list(model.model_fields), k=random.randrange(4))
        good: Body = {"prompt": "a"} if path in ("/v1/completions", "/tokenize") else {"tokens": [1]}
        if path == "/v1/chat/completions":
            good = {"messages": [{"role": "user", "content": "a"}]}
        body = json.dumps(good | {"max_tokens": 2} | {name: random.choice(VALUES) for name in names})
        reply = await running.client.post(path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code in (200, 400, 404, 422), (path, body, reply.text)
        seen.add((path, reply.status_code))
    assert {(path, status) for path in models for status in (200, 422)} <= seen
    await until(lambda: running.state() == before)


# Tokens


async def test_tokenize_and_detokenize(running: Running) -> None:
    post = running.client.post
    asked = {"model": "letters", "prompt": "aé<|in|>", "return_token_strs": True}
    told = (await post("/tokenize", json=asked)).json()
    assert (told["tokens"][:3], told["count"], told["max_model_len"]) == ([97, 0xC3, 0xA9], 9, 100)
    assert told["token_strs"][0] == "a"
    assert (await post("/detokenize", json={"tokens": told["tokens"]})).json() == {"prompt": "aé<|in|>"}
    messages = [{"role": "user", "content": "a"}]
    rendered = (await post("/tokenize", json={"messages": messages})).json()["tokens"]
    assert rendered == [IN, *b"user: a", 258, IN]
    assert (await post("/detokenize", json={"tokens": rendered})).json() == {"prompt": "<|in|>user: a<|out|><|in|>"}
    assert (await chat(running, "a")).usage.prompt_tokens == len(rendered)
    for path, body, field in (
        ("/detokenize", {"tokens": [259]}, "tokens"),
        ("/tokenize", {"prompt": "a", "messages": messages}, "body"),
        ("/tokenize", {}, "body"),
        ("/tokenize", {"prompt": "a", "model": "echo"}, "model"),
    ):
        refused = await post(path, json=body)
        assert (refused.status_code, refused.json()["field"]) == (422, field)
