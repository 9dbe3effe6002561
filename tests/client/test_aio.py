"""The async client against the same fake: every line that differs from the sync shell."""

from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest

from keypast import AsyncClient, Past, _protocol, errors
from keypast.schemas import Code

from .fake import FakeService, Sse, problem

pytestmark = pytest.mark.anyio


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(transport=service.transport) as client:
        yield client


async def test_a_session_follows_its_replies(client: AsyncClient, service: FakeService) -> None:
    async with await client.sessions.create("decoder", id="mine") as session:
        assert repr(session) == "<AsyncSession mine decoder v0 [0]>"
        result = await session.prefill(text="The capital", logits="last")
        assert result.logits is not None
        await session.step(token_ids=[[80]], expect_version=True)
        reply = await session.generate(max_tokens=3)
        assert reply.outputs.text == ["Par"]
        assert (session.version, session.valid_length) == (5, [15])
        await session.truncate(12)
        child = await session.fork(at=2)
        assert [each.valid_length for each in await session.fork(2)] == [[12], [12]]
        assert (child.view.parent, child.valid_length) == ("mine", [2])
        assert (await (await client.sessions.get("mine")).refresh()).version == 6
    assert service.gone == {"mine"}


async def test_a_score_leaves_the_session_as_it_is(client: AsyncClient) -> None:
    session = await client.sessions.create("decoder")
    await session.prefill(text="The")
    score = await session.score(text=" capital", logits="last")
    assert (score.past_length, score.valid_length, score.version) == ([3], [11], 1)
    assert ((await session.refresh()).version, session.valid_length) == (1, [3])


async def test_attention_takes_and_gives_arrays(client: AsyncClient) -> None:
    query = np.arange(8, dtype=np.float16).reshape(1, 2, 4)
    session = await client.sessions.create("attention")
    result = await session.prefill(query=query, key=query, value=query, attention_mask=np.ones((1, 2, 2), bool))
    assert result.attn_out is not None
    np.testing.assert_array_equal(result.attn_out, query)


async def test_a_stream_gives_tokens_and_its_end(client: AsyncClient, service: FakeService) -> None:
    session = await client.sessions.create("decoder")
    stream = await session.generate(stream=True, max_tokens=7)
    assert "".join([token.text async for token in stream]) == "Paris. "
    assert stream.end is not None
    assert session.valid_length == [7]
    assert service.streams[0].closed


async def test_leaving_a_stream_closes_it(client: AsyncClient, service: FakeService) -> None:
    session = await client.sessions.create("decoder")
    async with await session.generate(stream=True, max_tokens=20) as stream:
        async for token in stream:
            if token.text == "r":
                break
    assert service.streams[0].closed
    assert session.valid_length == [3]


async def test_a_broken_stream_says_so(client: AsyncClient, service: FakeService) -> None:
    session = await client.sessions.create("decoder")
    service.interrupt = httpx.ReadError("")
    with pytest.raises(errors.StreamBroken, match="ReadError"):
        [token async for token in await session.generate(stream=True, max_tokens=20)]
    assert session.valid_length == [2]
    service.answers.append(problem(Code.MODEL_FAILED))
    with pytest.raises(errors.ModelFailed):
        await session.generate(stream=True)


async def test_an_update_is_a_merge_patch(client: AsyncClient) -> None:
    session = await client.sessions.create("decoder", labels={"a": "1"})
    await session.update(ttl_seconds=60, labels={"a": None, "c": "3"})
    assert (session.view.labels, session.view.ttl_seconds, session.version) == ({"c": "3"}, 60, 0)


async def test_a_past_goes_from_session_to_session(client: AsyncClient) -> None:
    session, copy = [await client.sessions.create("decoder") for _ in range(2)]
    await session.prefill(text="abc")
    past = await session.past(expect_version=True)
    await copy.load_past(past, if_version=0)
    assert (copy.version, copy.valid_length) == (1, [3])
    assert (await copy.past()).digest == past.digest
    with pytest.raises(errors.WrongState):
        await copy.load_past(past)


async def test_a_long_body_goes_in_pieces(client: AsyncClient) -> None:
    past = Past({"key_past.0": np.zeros((1, 1, 1, 3 << 20), np.uint8)}, [1], "k", "f")
    async with httpx.AsyncClient(base_url="http://k") as http:
        stream = _protocol.build(http, _protocol.put_past("s", past)).stream
    assert isinstance(stream, httpx.AsyncByteStream)
    assert b"".join([piece async for piece in stream]) == past.to_bytes()


async def test_a_batch_of_steps_moves_each_session(client: AsyncClient) -> None:
    first, empty = [await client.sessions.create("decoder") for _ in range(2)]
    await first.prefill(text="The")
    done, refused = await client.batch_step([(first, {"token_ids": [[80]]}), (empty, {"token_ids": [[80]]})])
    assert isinstance(refused, errors.WrongState)
    assert not isinstance(done, errors.StatusError)
    assert (done.valid_length, first.valid_length, first.version) == ([4], [4], 2)


async def test_events_come_with_their_ids(client: AsyncClient, service: FakeService) -> None:
    told = b'id: r-1\nevent: created\ndata: {"id":"r-1","type":"created","session_id":"a","version":0}\n\n'
    stream = Sse(iter([told, httpx.ReadError("reset")]))
    service.answers = [httpx.Response(200, stream=stream)]
    async with await client.events("r-0") as feed:
        assert (await anext(feed)).session_id == "a"
        with pytest.raises(errors.StreamBroken):
            await anext(feed)
    assert (feed.last_id, stream.closed) == ("r-1", True)
    assert service.requests[0].headers["Last-Event-ID"] == "r-0"


async def test_lists_page_by_page(client: AsyncClient) -> None:
    for name in "abcde":
        await client.sessions.create("decoder", id=name)
    assert [session.id async for session in client.sessions.list()] == list("abcde")
    assert (await client.sessions.delete("a")).id == "a"
    with pytest.raises(errors.SessionGone):
        await client.sessions.get("a")


async def test_about_the_service(client: AsyncClient) -> None:
    assert [model.id for model in await client.models()] == ["attention", "decoder"]
    assert (await client.capacity()).sessions == 0
    assert await client.version() == "0.1.0"
    assert await client.ready()
    assert repr(client) == "<AsyncClient http://127.0.0.1:8000>"


async def test_what_was_safely_refused_is_sent_again() -> None:
    service = FakeService(httpx.ConnectError("refused"), problem(Code.QUEUE_FULL, retry_header=3))
    sleeps: list[float] = []

    async def sleep(seconds: float) -> None:
        sleeps.append(seconds)

    async with AsyncClient(transport=service.transport, sleep=sleep) as client:
        await client.version()
        assert sleeps == [0.1, 3.0]
        service.answers = [httpx.ReadTimeout("slow")] * 3
        with pytest.raises(errors.TimedOut):
            await client.version()


async def test_half_a_reply(client: AsyncClient, service: FakeService) -> None:
    class Half(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"{"
            raise httpx.ReadError("reset")

    service.answers = [httpx.Response(200, stream=Half()) for _ in range(3)]
    with pytest.raises(errors.TransportError, match="may have been applied"):
        await client.version()


async def test_a_lost_reply_is_asked_for_again_and_nothing_is_done_twice() -> None:
    service = FakeService()
    sleeps: list[float] = []

    async def sleep(seconds: float) -> None:
        sleeps.append(seconds)

    async with AsyncClient(transport=service.transport, sleep=sleep) as client:
        service.lost = [httpx.ReadError("reset")]
        session = await client.sessions.create("decoder")
        service.lost = [httpx.ReadError("reset"), httpx.ReadTimeout("slow")]
        prefilled = await session.prefill(text="The")
        assert (prefilled.replayed, prefilled.version, session.valid_length) == (True, 1, [3])
        service.lost = [httpx.ReadError("reset")]
        child = await session.fork(at=2, idempotency_key="mine")
        service.lost = [httpx.ReadError("reset")]
        generated = await session.generate(max_tokens=2)
        assert (generated.replayed, generated.outputs.text) == (True, ["Pa"])
        service.answers = [httpx.ReadError("reset")]
        async with await session.generate(stream=True, max_tokens=1) as tokens:
            assert [token.text async for token in tokens] == ["P"]
            assert tokens.replayed is False
        service.lost = [httpx.ReadError("reset")]
        assert (await child.delete()).positions == 2
        assert session.valid_length == [6]
    assert len(service.sessions) == 1
    assert sleeps == [0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1]
