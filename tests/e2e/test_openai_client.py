"""OpenAI's own client, as it is installed, its retries as they are by default, through a proxy that loses replies."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, OpenAI

from keypast import Client
from tests.e2e.losing_proxy import LosingProxy
from tests.e2e.test_server import Server

FAST = "tests.e2e.quick_service"
MODEL = "letters"
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with Server(FAST) as server:
        yield server.address()


@pytest.fixture
def proxy(service: str) -> Iterator[LosingProxy]:
    with LosingProxy(service) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def native(service: str) -> dict[str, str]:
    """What the service's own API writes after a text, and after a conversation."""
    with Client(service) as client:
        told = {}
        for name, said in (("text", {"text": "abc"}), ("chat", {"messages": MESSAGES})):
            with client.sessions.create(MODEL) as session:
                session.prefill(**said)
                told[name] = session.generate(max_tokens=6).outputs.text[0]
    return told


def wants(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 6, "temperature": 0, **more}


def streamed(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def open_client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none")


def test_without_a_session(service: str, proxy: LosingProxy, native: dict[str, str]) -> None:
    with open_client(proxy.address) as client, Client(service) as witness:
        assert [model.id for model in client.models.list()] == ["letters", "echo"]
        proxy.lose = 1
        completion = client.completions.create(prompt="abc", **wants(n=2, logprobs=2, echo=True))
        assert [choice.text for choice in completion.choices] == ["abc" + native["text"]] * 2
        assert completion.choices[0].logprobs is not None
        assert completion.choices[0].logprobs.tokens == list("abcdefghi")
        reply = client.chat.completions.create(messages=MESSAGES, **wants(logprobs=True, top_logprobs=2))
        assert reply.choices[0].message.content == native["chat"]
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 6
        chunks = list(
            client.chat.completions.create(
                messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **wants()
            )
        )
        assert streamed(chunks) == native["chat"]
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == reply.usage.prompt_tokens - 1, "asked a moment ago"
        assert witness.capacity().sessions == 0


@pytest.mark.parametrize("lost", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_is_never_taken_twice(
    service: str, proxy: LosingProxy, native: dict[str, str], lost: int, stream: bool
) -> None:
    with open_client(proxy.address) as client, Client(service) as witness:
        session = witness.sessions.create(MODEL)
        asked = wants(messages=MESSAGES, stream=stream, extra_body={"session_id": session.id})
        lengths = []
        for _ in range(2):
            proxy.lose, proxy.lost = lost, []
            reply: Any = client.chat.completions.create(**asked)
            text = streamed(reply) if stream else reply.choices[0].message.content
            assert (text, len(proxy.lost)) == (native["chat"], lost)
            lengths.append(session.refresh().valid_length[0])
        prompt = lengths[0] - 6
        assert lengths[1] == 2 * lengths[0] + 1, "the second turn closes the first one's reply"
        assert prompt == len("#user: hello##")
        session.delete()


def test_what_an_error_says(service: str, proxy: LosingProxy) -> None:
    with open_client(proxy.address) as client:
        with pytest.raises(APIStatusError) as caught:
            client.completions.create(prompt="a", **wants(n=129))
        assert (caught.value.status_code, caught.value.param, caught.value.code) == (422, "n", "invalid_input")
        with pytest.raises(APIStatusError) as caught:
            client.completions.create(prompt="a", **wants(extra_body={"session_id": "none"}))
        assert (caught.value.status_code, caught.value.code) == (404, "session_not_found")


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False], ids=["session", "stateless"])
def test_a_conversation_of_the_real_model_is_computed_once(named: bool) -> None:
    """Sent whole each time, as most clients do. What is computed are the words that are new."""
    headers = {"X-Session-ID": "mine"} if named else {}
    messages: Any = []
    server = Server("service", models="smollm2-135m=default", kv_memory="256MiB")
    with server, open_client(server.address()) as client:
        before = 0
        for question in ("What is the capital of France?", "And of Italy?", "Name a river there."):
            messages.append({"role": "user", "content": question})
            reply = client.chat.completions.create(
                model="smollm2-135m", messages=messages, max_tokens=20, temperature=0, extra_headers=headers
            )
            messages.append({"role": "assistant", "content": reply.choices[0].message.content})
            usage = reply.usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            assert usage.prompt_tokens_details.cached_tokens == before
            before = usage.total_tokens
        assert "Paris" in messages[1]["content"]


@pytest.mark.anyio
async def test_async(service: str, proxy: LosingProxy, native: dict[str, str]) -> None:
    async with AsyncOpenAI(base_url=f"{proxy.address}/v1", api_key="none") as client:
        headers = {"X-Session-ID": "async"}
        for stream in (False, True):
            proxy.lose = 1
            reply: Any = await client.chat.completions.create(
                **wants(messages=MESSAGES, stream=stream, extra_headers=headers)
            )
            text = streamed([chunk async for chunk in reply]) if stream else reply.choices[0].message.content
            assert text == native["chat"]
        told = await client.completions.create(prompt=["abc", "x"], **wants())
        assert told.choices[0].text == native["text"]
    with Client(service) as witness:
        session = witness.sessions.get("async")
        assert session.valid_length == [2 * 20 + 1]
        session.delete()
