"""Generate: as one reply and as a stream."""

import asyncio
from typing import Any

import pytest

from keypast.schemas import GenerateReply, StreamEnd, StreamToken
from tests.service.conftest import Running, Start
from tests.service.fakes import END, KINDS, POISON, event_data

pytestmark = pytest.mark.anyio

E_ACUTE = "é".encode()


async def session(running: Running, text: str | list[str], **fields: object) -> str:
    rows = 1 if isinstance(text, str) else len(text)
    path = f"/v1/sessions/{await running.session('letters', batch_size=rows, **fields)}"
    assert (await running.client.post(f"{path}/prefill", json={"text": text})).status_code == 200
    return path


async def both(running: Running, path: str, **options: Any) -> tuple[GenerateReply, list[Any]]:
    """The same generation as one reply and, on a fork, as a stream."""
    fork = (await running.client.post(f"{path}/fork", json={})).json()["sessions"][0]["id"]
    reply = await running.client.post(f"{path}/generate", json=options)
    assert reply.status_code == 200, reply.text
    assert reply.headers["etag"] == f'"{reply.json()["version"]}"'
    stream = await running.client.post(f"/v1/sessions/{fork}/generate", json={**options, "stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = event_data(stream.text)
    assert events[-1] == "[DONE]"
    whole = GenerateReply.model_validate_json(reply.content)
    tokens = [StreamToken.model_validate(event) for event in events[:-2]]
    end = StreamEnd.model_validate(events[-2])
    assert (end.finish_reason, end.valid_length) == (whole.finish_reason, whole.valid_length)
    for row, text in enumerate(whole.outputs.text):
        assert "".join(token.text[row] for token in tokens) + (end.text or [""] * 9)[row] == text
        ids = [token.token_ids[row] for token in tokens]
        assert [token for token in ids if token is not None] == whole.outputs.token_ids[row]
    assert [token.version for token in tokens] == list(range(1, 1 + len(tokens))), "every token is a commit"
    return whole, events


async def test_ends_at_max_tokens(running: Running) -> None:
    path = await session(running, "ab")
    reply, events = await both(running, path, max_tokens=3)
    assert (reply.outputs.text, reply.finish_reason) == (["cde"], ["length"])
    assert (reply.past_length, reply.valid_length, reply.outputs.logprobs) == ([2], [5], None)
    assert events[0] == {"token_ids": [99], "text": ["c"], "valid_length": [3], "version": 1}


async def test_ends_at_max_length(running: Running) -> None:
    reply, _ = await both(running, await session(running, "ab", max_length=4), max_tokens=9)
    assert (reply.outputs.text, reply.finish_reason, reply.valid_length) == (["cd"], ["length"], [4])


async def test_ends_before_the_end_token_unless_told_to_go_on(running: Running) -> None:
    running.fakes.decoder.after = {ord("c"): END, END: ord("x")}
    path = await session(running, "a")
    reply, _ = await both(running, path, max_tokens=4)
    assert (reply.outputs.text, reply.finish_reason, reply.valid_length) == (["bc"], ["stop"], [3])
    reply_2 = await running.client.post(f"{path}/generate", json={"max_tokens": 3, "ignore_eos": True})
    assert reply_2.json()["outputs"] == {"token_ids": [[END, ord("x"), ord("y")]], "text": ["xy"]}


@pytest.mark.parametrize(
    ("stop", "text", "appended"),
    [
        ("d", "bc", "bc"),
        ("cd", "b", "bc"),
        (["zz", "ef", "cx"], "bcd", "bcde"),
        ("nothing", "bcdef", "bcdef"),
        ("efz", "bcdef", "bcdef"),
    ],
)
async def test_stop_texts_are_never_shown(running: Running, stop: str | list[str], text: str, appended: str) -> None:
    reply, events = await both(running, await session(running, "a"), max_tokens=5, stop=stop)
    assert reply.outputs.text == [text]
    assert "".join(map(chr, reply.outputs.token_ids[0])) == appended
    assert reply.finish_reason == ["stop" if len(appended) < 5 else "length"]
    shown = "".join(event["text"][0] for event in events[:-2])
    assert text.startswith(shown)


async def test_half_a_character_waits_for_the_other(running: Running) -> None:
    running.fakes.decoder.after = {ord("a"): E_ACUTE[0], E_ACUTE[0]: E_ACUTE[1], E_ACUTE[1]: ord("z")}
    path = await session(running, "a")
    reply, events = await both(running, path, max_tokens=3)
    assert reply.outputs.text == ["éz"]
    assert [event["text"] for event in events[:-2]] == [[""], ["é"], ["z"]]
    reply, _ = await both(running, await session(running, "a"), max_tokens=1)
    assert reply.outputs.text == ["\N{REPLACEMENT CHARACTER}"], "a character that never came"


async def test_rows_end_each_at_their_own_token(running: Running) -> None:
    running.fakes.decoder.after = {ord("n"): END}
    path = await session(running, ["a", "lm", "xy"])
    reply, events = await both(running, path, max_tokens=3, stop="z", logprobs=True)
    assert reply.outputs.text == ["bcd", "n", ""]
    assert reply.finish_reason == ["length", "stop", "stop"]
    assert reply.valid_length == [4, 3, 2]
    assert reply.outputs.logprobs == [[-0.5] * 3, [-0.5], []]
    assert events[1]["token_ids"] == [ord("c"), None, None]
    assert events[1]["logprobs"] == [-0.5, None, None]


async def test_a_token_drawn_and_not_appended_is_not_shown(running: Running) -> None:
    """A row at its max_length draws on while another writes."""
    running.fakes.decoder.after = {ord("c"): E_ACUTE[0]}
    path = await session(running, ["aab", "a"], max_length=4)
    reply, _ = await both(running, path, max_tokens=9)
    assert [list(map(chr, ids)) for ids in reply.outputs.token_ids] == [["c"], ["b", "c", "Ã"]]
    assert reply.outputs.text == ["c", "bc\N{REPLACEMENT CHARACTER}"]


async def test_generate_after_a_truncate(running: Running) -> None:
    path = await session(running, "abc")
    await running.client.post(f"{path}/truncate", json={"length": 1})
    reply = await running.client.post(f"{path}/generate", json={"max_tokens": 2})
    assert reply.json()["outputs"]["text"] == ["bc"]


async def test_if_match(running: Running) -> None:
    path = await session(running, "abc")
    for stream in (True, False):
        reply = await running.client.post(
            f"{path}/generate", json={"max_tokens": 2, "stream": stream}, headers={"if-match": '"7"'}
        )
        assert (reply.status_code, reply.json()["version"]) == (412, 1)


async def test_an_error_amid_a_stream_is_its_last_event(running: Running) -> None:
    running.fakes.decoder.after = {ord("c"): POISON}
    path = await session(running, "a")
    reply = await running.client.post(f"{path}/generate", json={"max_tokens": 9, "stream": True, "ignore_eos": True})
    *tokens, error, done = event_data(reply.text)
    assert (reply.status_code, len(tokens), done) == (200, 2, "[DONE]")
    assert (error["error"]["type"], error["error"]["code"]) == ("server_error", "model_failed")
    assert (error["status"], error["code"], error["title"]) == (500, "model_failed", "Internal Server Error")
    assert "/secret" not in reply.text
    assert running.fakes.engine.sessions()[0].valid_length == [3], "at the last committed position"


async def test_a_reply_that_ends_in_an_error_tells_what_was_appended(running: Running) -> None:
    """An error status would be retried, and these tokens appended twice."""
    running.fakes.decoder.after = {ord("c"): POISON}
    reply = await running.client.post(
        f"{await session(running, 'a')}/generate", json={"max_tokens": 9, "logprobs": True}
    )
    body = GenerateReply.model_validate_json(reply.content)
    assert (reply.status_code, body.finish_reason, body.outputs.text) == (200, ["cancelled"], ["bc"])
    assert (body.past_length, body.valid_length, body.version) == ([1], [3], 3)
    assert body.outputs.logprobs == [[-0.5, -0.5]]
    assert body.problem is not None
    assert (body.problem.status, body.problem.code) == (500, "model_failed")


async def full(start: Start) -> tuple[Running, str, str]:
    """A service of 4 blocks of 4 positions, three of them another session's; the path of one of 2 positions, and of
    that other."""
    running: Running = await start(blocks=5, wait_seconds=0.05)
    other = await running.prefilled(KINDS["decoder"], 12)
    return running, await session(running, "ab"), f"/v1/sessions/{other}"


@pytest.mark.parametrize("named", [True, False])
async def test_one_that_runs_out_of_blocks_tells_what_it_has_appended_and_why_it_ended(
    start: Start, named: bool
) -> None:
    """The status is 200, for its tokens are there. Going on from there yields what it would have without the gap."""
    running, path, other = await full(start)
    key = {"idempotency-key": "k"} if named else {}
    reply = await running.client.post(f"{path}/generate", json={"max_tokens": 5}, headers=key)
    body = GenerateReply.model_validate_json(reply.content)
    assert (reply.status_code, body.finish_reason, body.outputs.text) == (200, ["cancelled"], ["cd"])
    assert (body.past_length, body.valid_length, body.version) == ([2], [4], 3)
    assert body.problem is not None
    assert (body.problem.status, body.problem.code, body.problem.retry_after) == (429, "pool_exhausted", 1.0)
    assert (await running.client.get(path)).json()["valid_length"] == [4]
    if named:
        again = await running.client.post(f"{path}/generate", json={"max_tokens": 5}, headers=key)
        assert (again.headers["idempotent-replayed"], again.text) == ("true", reply.text)
    refused = await running.client.post(f"{path}/generate", json={"max_tokens": 3})
    assert (refused.status_code, refused.json()["code"]) == (429, "pool_exhausted"), (
        "nothing was appended: it may say so"
    )
    assert refused.headers["retry-after"] == "1"
    await running.client.delete(other)
    rest = await running.client.post(f"{path}/generate", json={"max_tokens": 3})
    assert (rest.json()["outputs"]["text"], rest.json()["valid_length"]) == (["efg"], [7])
    assert "problem" not in rest.json()


async def test_a_stream_that_runs_out_of_blocks_ends_with_the_problem(start: Start) -> None:
    """Its own status was 200; the problem has the one that it would have had, and when to try again."""
    running, path, _ = await full(start)
    body = {"max_tokens": 5, "stream": True}
    reply, again = [
        await running.client.post(f"{path}/generate", json=body, headers={"idempotency-key": "k"}) for _ in "ab"
    ]
    *tokens, problem, done = event_data(reply.text)
    assert (reply.status_code, [token["text"] for token in tokens], done) == (200, [["c"], ["d"]], "[DONE]")
    assert (problem["status"], problem["code"], problem["retry_after"]) == (429, "pool_exhausted", 1.0)
    assert (problem["error"]["type"], problem["error"]["code"]) == ("rate_limit_error", "pool_exhausted")
    *told, end, _ = event_data(again.text)
    assert (told, end["finish_reason"], end["problem"]["code"]) == (tokens, ["cancelled"], "pool_exhausted")
    refused = await running.client.post(f"{path}/generate", json={"max_tokens": 3, "stream": True})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1"), "before the first token"


async def test_a_session_deleted_amid_a_generation_is_gone(running: Running) -> None:
    path = await session(running, "a")
    running.fakes.decoder.gate.clear()
    running.fakes.decoder.entered.clear()
    generation = asyncio.create_task(running.client.post(f"{path}/generate", json={"max_tokens": 9}))
    await asyncio.to_thread(running.fakes.decoder.entered.wait)
    await running.client.delete(path)
    running.fakes.decoder.gate.set()
    assert (await generation).status_code == 410


async def test_silence_is_broken_by_pings(start: Start) -> None:
    running = await start(settings={"ping_seconds": 0.02})
    path = await session(running, "a")
    running.fakes.decoder.gate.clear()
    generation = asyncio.create_task(running.client.post(f"{path}/generate", json={"max_tokens": 1, "stream": True}))
    await asyncio.sleep(0.1)
    running.fakes.decoder.gate.set()
    text = (await generation).text
    assert text.startswith(": ping\n\n: ping\n\n")
    assert event_data(text)[0]["text"] == ["b"]
