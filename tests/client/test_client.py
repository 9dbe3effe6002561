"""The sync client against the fake service: what it sends, what it gives, what the session object then knows."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import keypast
from keypast import Client, Past, Retries, _protocol, errors, schemas
from keypast.schemas import Code

from .fake import FakeService, Sse, problem


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def client(service: FakeService) -> Iterator[Client]:
    with Client(transport=service.transport) as client:
        yield client


def test_a_session_follows_its_replies(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder", id="mine", ttl_seconds=60, labels={"team": "red"})
    assert repr(session) == "<Session mine decoder v0 [0]>"
    result = session.prefill(text="The capital", sample={"temperature": 0})
    assert (result.past_length, result.valid_length, result.next_token, result.text) == ([0], [11], [80], ["P"])
    assert (result.computed, result.reused, result.shared) == ([1], [4], [2])
    assert (session.version, session.valid_length) == (1, [11])
    session.step(token_ids=[[80]])
    assert (session.version, session.valid_length) == (2, [12])
    reply = session.generate(max_tokens=3)
    assert (reply.outputs.text, reply.finish_reason) == (["Par"], ["length"])
    assert (session.version, session.valid_length) == (5, [15])
    session.truncate(12)
    assert (session.version, session.valid_length) == (6, [12])
    assert session.delete().positions == 12
    with pytest.raises(errors.SessionGone) as caught:
        session.refresh()
    assert caught.value.reason == "deleted"


def test_a_score_leaves_the_session_as_it_is(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder")
    session.prefill(text="The")
    score = session.score(text=" capital", logits="all", expect_version=True)
    assert (score.past_length, score.valid_length, score.version) == ([3], [11], 1)
    assert score.logits is not None
    assert (session.version, session.valid_length) == (1, [3])
    assert (session.refresh().version, session.valid_length) == (1, [3])
    with pytest.raises(errors.PreconditionFailed):
        session.score(text="x", if_version=0)


def test_logits_come_as_arrays_even_when_not_finite(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder")
    result = session.prefill(text="a", logits="last")
    assert result.logits is not None
    assert result.logits.shape == (1, 3)
    assert np.isneginf(result.logits).all()
    assert service.requests[-1].headers["Accept"] == "application/vnd.safetensors"


@pytest.mark.parametrize(
    ("binary", "content_type"), [(True, "application/vnd.safetensors"), (False, "application/json")]
)
def test_attention_takes_and_gives_arrays(binary: bool, content_type: str) -> None:
    service = FakeService()
    query = np.arange(8, dtype=np.float16).reshape(1, 2, 4)
    with Client(transport=service.transport, binary=binary) as client, client.sessions.create("attention") as session:
        mask = np.ones((1, 2, 2), np.uint8)
        result = session.prefill(query=query, key=query, value=query, attention_mask=mask, need_weights=True)
        assert service.requests[-1].headers["Content-Type"] == content_type
        assert result.attn_out is not None
        assert result.attn_out.dtype == np.float16
        np.testing.assert_array_equal(result.attn_out, query)
        assert result.attn_weights is not None
        assert result.attn_weights.shape == (1, 1, 2)
        session.step(query=query[:, :1], key=query[:, :1], value=query[:, :1])
        assert session.valid_length == [3]


@pytest.mark.parametrize("binary", [True, False])
def test_keys_are_brought_once_and_asked_by_queries_alone(binary: bool) -> None:
    tensor = np.arange(12, dtype=np.float16).reshape(1, 3, 4)
    with Client(transport=FakeService().transport, binary=binary) as client:
        session = client.sessions.create("attention")
        with pytest.raises(errors.WrongState):
            session.step(query=tensor[:, :1])
        brought = session.prefill(key=tensor, value=tensor)
        assert (brought.attn_out, session.valid_length, session.version) == (None, [3], 1)
        for result, n in (
            (session.step(query=tensor[:, :1]), 1),
            (session.prefill(query=tensor[:, :2], attention_mask=np.ones((1, 2, 3), bool), expect_version=True), 2),
        ):
            assert (result.past_length, result.valid_length, result.version) == ([3], [3], 1)
            np.testing.assert_array_equal(result.attn_out, tensor[:, :n])
        assert (session.valid_length, session.version) == ([3], 1)


def test_rows_of_a_batch(client: Client) -> None:
    session = client.sessions.create("decoder", batch_size=2)
    assert session.batch_size == 2
    session.prefill(token_ids=np.array([[1, 2, 3], [4, 0, 0]]), batch_valid_length=np.array([3, 1]))
    assert session.valid_length == [3, 1]
    session.prefill(text=["ab", "c"])
    assert session.valid_length == [5, 2]
    tokens = list(session.generate(stream=True, max_tokens=2))
    assert tokens[0].texts == ["P", "P"]
    session.truncate([1, 0])
    assert session.valid_length == [1, 0]


def test_a_stream_gives_tokens_and_its_end(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder")
    session.prefill(text="x")
    stream = session.generate(stream=True, max_tokens=7)
    tokens = list(stream)
    assert "".join(token.text for token in tokens) == "Paris. "
    assert (tokens[0].token_id, tokens[0].valid_length, tokens[0].version) == (80, [2], 2)
    assert stream.end is not None
    assert stream.end.finish_reason == ["length"]
    assert (session.version, session.valid_length) == (8, [8])
    assert service.streams[0].closed


def test_leaving_a_stream_closes_it(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder")
    for token in session.generate(stream=True, max_tokens=20):
        if token.text == "r":
            break
    assert service.streams[0].closed
    assert session.valid_length == [3]
    with session.generate(stream=True, max_tokens=20) as stream:
        assert next(stream).text == "P"
    assert service.streams[1].closed
    session.generate(stream=True, max_tokens=20).close()
    assert service.streams[2].closed
    assert service.streams[2].sent == 0


def test_a_broken_stream_says_so_and_keeps_what_came(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder")
    service.interrupt = httpx.ReadError("reset")
    with pytest.raises(errors.StreamBroken, match="reset"):
        list(session.generate(stream=True, max_tokens=20))
    assert session.valid_length == [2]
    assert service.streams[0].closed


def test_a_refused_stream_raises_before_the_first_token(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder")
    service.answers.append(problem(Code.WRONG_STATE, "nothing to go on from"))
    with pytest.raises(errors.WrongState, match="nothing to go on from"):
        session.generate(stream=True)


def test_forks(client: Client) -> None:
    session = client.sessions.create("decoder")
    session.prefill(text="abc")
    child = session.fork()
    assert (child.view.parent, child.valid_length) == (session.id, [3])
    assert [each.valid_length for each in session.fork(2, at=1)] == [[1], [1]]
    assert len(session.fork(1)) == 1
    with pytest.raises(errors.InvalidInput, match="count"):
        session.fork(0)


def test_an_update_is_a_merge_patch(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder", labels={"a": "1", "b": "2"})
    session.update(ttl_seconds=60, pinned=True, labels={"a": None, "c": "3"}, expect_version=True)
    assert service.requests[-1].headers["If-Match"] == '"0"'
    assert (session.view.labels, session.view.ttl_seconds, session.view.pinned) == ({"b": "2", "c": "3"}, 60, True)
    session.update(ttl_seconds=None, labels=None)
    assert service.requests[-1].content == b'{"ttl_seconds":null,"labels":null}'
    assert (session.view.labels, session.view.ttl_seconds, session.view.pinned, session.version) == ({}, None, True, 0)


def test_expectations(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder", id="s")
    client.sessions.get("s").prefill(text="ab")
    session.prefill(text="c")
    assert "If-Match" not in service.requests[-1].headers
    assert session.version == 2
    client.sessions.get("s").prefill(text="d")
    with pytest.raises(errors.PreconditionFailed) as caught:
        session.prefill(text="e", expect_version=True)
    assert (caught.value.version, caught.value.valid_length) == (3, [4])
    for act in (
        lambda: session.step(token_ids=[[1]], if_version=1),
        lambda: session.generate(if_version=1),
        lambda: session.generate(stream=True, if_version=1),
        lambda: session.fork(if_version=1),
        lambda: session.truncate(1, if_version=1),
        lambda: session.delete(if_version=1),
    ):
        with pytest.raises(errors.PreconditionFailed):
            act()
    assert session.refresh().version == 3
    session.prefill(text="e", expect_version=True)
    assert service.requests[-1].headers["If-Match"] == '"3"'


def test_a_past_goes_from_session_to_session(client: Client, service: FakeService, tmp_path: Path) -> None:
    session = client.sessions.create("decoder", batch_size=2)
    session.prefill(text=["abc", "d"])
    session.truncate([2, 1])
    session.version, session.valid_length = 0, [0, 0]
    past = session.past(if_version=2)
    assert (session.version, session.valid_length) == (2, [2, 1])
    assert service.requests[-1].headers["If-Match"] == '"2"'
    assert past.token_ids is not None
    assert past.token_ids.tolist() == [[97, 98], [100, 0]]
    past.save(tmp_path / "past")
    copy = client.sessions.create("decoder", batch_size=2)
    copy.load_past(keypast.Past.load(tmp_path / "past"), expect_version=True)
    assert service.requests[-1].headers["If-Match"] == '"0"'
    assert (copy.version, copy.valid_length) == (1, [2, 1])
    assert copy.past().digest == past.digest
    with pytest.raises(errors.WrongState):
        copy.load_past(past)


def test_a_past_that_cannot_travel_never_leaves(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder")
    past = session.past()
    past.arrays["key_past.0"] = np.zeros((1, 1, 1, 0))
    sent = len(service.requests)
    with pytest.raises(errors.InvalidInput, match="float64") as caught:
        session.load_past(past)
    assert (caught.value.field, len(service.requests)) == ("key_past.0", sent)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, headers={"ETag": '"1"'}, content=b"<html>"),
        httpx.Response(200, headers={"ETag": "1"}, content=keypast.Past({}, [], "k", "f").to_bytes()),
        httpx.Response(200, content=keypast.Past({}, [], "k", "f").to_bytes()),
    ],
)
def test_a_past_of_another_service(client: Client, service: FakeService, answer: httpx.Response) -> None:
    session = client.sessions.create("decoder")
    service.answers.append(answer)
    with pytest.raises(errors.ProtocolError, match="not the past"):
        session.past()


def test_a_long_body_goes_in_pieces_and_declares_its_length(client: Client) -> None:
    call = _protocol.put_past("s", keypast.Past({"key_past.0": np.zeros((1, 1, 1, 3 << 20), np.uint8)}, [1], "k", "f"))
    with httpx.Client(base_url="http://k") as http:
        request = _protocol.build(http, call)
    assert isinstance(request.stream, httpx.SyncByteStream)
    pieces = list(request.stream)
    assert (b"".join(pieces), max(map(len, pieces))) == (call.body, _protocol.PIECE)
    assert request.headers["Content-Length"] == str(len(call.body))
    assert list(request.stream) == pieces, "it can be sent again"


@pytest.mark.parametrize("binary", [True, False])
def test_a_batch_of_steps_moves_each_session(service: FakeService, binary: bool) -> None:
    client = Client(transport=service.transport, binary=binary)
    words, empty, layer = [client.sessions.create(name) for name in ("decoder", "decoder", "attention")]
    words.prefill(text="The")
    query = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    layer.prefill(query=query, key=query, value=query, attention_mask=np.ones((1, 1, 1), bool))
    done, refused, answered, moved = client.batch_step(
        [
            (words, {"token_ids": [[80]], "logits": "last", "expect_version": True}),
            (empty, {"token_ids": [[80]]}),
            (layer, {"query": query, "key": query, "value": query}),
            (words, {"token_ids": [[80]], "if_version": 0}),
        ]
    )
    assert isinstance(done, keypast.AppendResult)
    assert (done.valid_length, words.valid_length, words.version) == ([4], [4], 2)
    assert done.logits is not None
    assert np.isneginf(done.logits).all()
    assert isinstance(refused, errors.WrongState)
    assert (empty.valid_length, empty.version) == ([0], 0)
    assert isinstance(answered, keypast.AppendResult)
    np.testing.assert_array_equal(np.asarray(answered.attn_out), query)
    assert layer.valid_length == [2]
    assert isinstance(moved, errors.PreconditionFailed)
    assert moved.version == 2
    sent = "application/vnd.safetensors" if binary else "application/json"
    assert (service.requests[-1].headers["Content-Type"], service.requests[-1].headers["Accept"]) == (sent, sent)
    assert "safetensors" not in _lightest(client, service, words)


def _lightest(client: Client, service: FakeService, session: keypast.Session) -> str:
    """How a batch without tensors travels."""
    client.batch_step([(session, {"token_ids": [[1]]})])
    headers = service.requests[-1].headers
    return headers["Content-Type"] + headers["Accept"]


def test_a_batch_that_never_leaves_or_comes_back_wrong(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder")
    sent = len(service.requests)
    with pytest.raises(errors.InvalidInput, match=r"token_ids\[0\]"):
        client.batch_step([(session, {"token_ids": [["x"]]})])
    with pytest.raises(errors.InvalidInput, match="complex64"):
        client.batch_step([(session, {"query": np.zeros((1, 1, 4), np.complex64)})])
    assert len(service.requests) == sent
    for body in ('{"items": []}', '{"items": [{"status": 200}]}', "{}", "nonsense"):
        service.answers = [httpx.Response(200, headers={"Content-Type": "application/json"}, content=body)]
        with pytest.raises(errors.ProtocolError, match="not the reply that was expected"):
            client.batch_step([(session, {"token_ids": [[1]]})])
    service.answers = [problem(Code.QUEUE_FULL)] * 3
    with pytest.raises(errors.QueueFull):
        client.batch_step([(session, {"token_ids": [[1]]})])


def sse(*chunks: bytes | BaseException) -> Sse:
    return Sse(iter(chunks))


CREATED = b'id: r-1\nevent: created\ndata: {"id":"r-1","type":"created","session_id":"a","version":0}\n\n'
GAP = b'id: r-7\nevent: gap\ndata: {"id":"r-7","type":"gap","lost":6}\n\n'


def test_events_come_with_their_ids(client: Client, service: FakeService) -> None:
    stream = sse(b": ping\n\n", CREATED[:30], CREATED[30:] + GAP)
    service.answers = [httpx.Response(200, stream=stream), httpx.Response(200, stream=sse())]
    feed = client.events()
    assert [(event.type, event.session_id, event.lost) for event in feed] == [("created", "a", None), ("gap", None, 6)]
    assert (feed.last_id, stream.closed) == ("r-7", True)
    with client.events(feed.last_id) as again:
        assert list(again) == []
    assert [request.headers.get("Last-Event-ID") for request in service.requests] == [None, "r-7"]


def test_leaving_the_events_closes_them(client: Client, service: FakeService) -> None:
    stream = sse(CREATED, GAP)
    service.answers = [httpx.Response(200, stream=stream)]
    with client.events() as feed:
        assert next(feed).type == "created"
    assert (stream.closed, stream.sent, feed.last_id) == (True, 1, "r-1")


def test_events_that_break_off_or_are_refused(client: Client, service: FakeService) -> None:
    service.answers = [httpx.Response(200, stream=sse(CREATED, httpx.ReadError("reset")))]
    feed = client.events()
    assert next(feed).id == "r-1"
    with pytest.raises(errors.StreamBroken, match="the events broke off: reset"):
        next(feed)
    assert feed.last_id == "r-1"
    service.answers = [problem(Code.INVALID_INPUT, field="Last-Event-ID")]
    with pytest.raises(errors.InvalidInput):
        client.events("nonsense")
    failed = b'data: {"error": {"message": "failed", "type": "server_error", "code": "internal"}}\n\n'
    for chunk, error in ((failed, errors.ServerError), (b"data: 5\n\n", errors.ProtocolError)):
        service.answers = [httpx.Response(200, stream=sse(chunk))]
        with pytest.raises(error):
            list(client.events())


def test_lists_page_by_page(client: Client, service: FakeService) -> None:
    for name in "abcde":
        client.sessions.create("decoder" if name != "c" else "attention", id=name)
    assert [session.id for session in client.sessions.list()] == list("abcde")
    assert [session.id for session in client.sessions.list(model="decoder", label=["a", "b=1"], limit=2)] == list(
        "abde"
    )
    assert dict(service.requests[-1].url.params.multi_items())["cursor"] == "2"
    assert service.requests[-1].url.params.get_list("label") == ["a", "b=1"]


def test_a_context_deletes_and_hides_nothing(client: Client, service: FakeService) -> None:
    with client.sessions.create("decoder", id="s"):
        assert "s" in service.sessions
    assert service.gone == {"s"}
    with pytest.raises(ZeroDivisionError), client.sessions.create("decoder", id="t") as session:
        client.sessions.delete(session.id).bytes // 0
    with client.sessions.create("decoder", id="u"):
        client.sessions.delete("u")


def test_about_the_service(client: Client, service: FakeService) -> None:
    assert [model.id for model in client.models()] == ["attention", "decoder"]
    assert client.capacity().pools[0].blocks.free == 6
    assert client.version() == "0.1.0"
    assert client.ready()
    service.answers.append(problem(Code.ENGINE_STOPPED, retry_header=1))
    assert not client.ready()
    assert repr(client) == "<Client http://127.0.0.1:8000>"


def test_the_address(service: FakeService) -> None:
    environment = {"KEYPAST_URL": "http://there:1/under"}
    with Client(transport=service.transport, environment=environment) as client:
        client.sessions.create("decoder", id="s")
        with pytest.raises(errors.SessionNotFound):
            client.sessions.get("a/b ü")
    assert str(service.requests[0].url) == "http://there:1/under/v1/sessions"
    assert service.requests[1].url.raw_path == b"/under/v1/sessions/a%2Fb%20%C3%BC"
    for wrong in ("localhost:8000", "ftp://x", "http://a:b", "http://", "x"):
        with pytest.raises(ValueError, match="address"):
            Client(wrong)


def test_wrong_arguments_never_leave(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder")
    sent = len(service.requests)
    with pytest.raises(errors.InvalidInput) as caught:
        session.generate(max_tokens=0)
    assert (caught.value.field, caught.value.status) == ("max_tokens", 422)
    with pytest.raises(errors.InvalidInput) as caught:
        session.prefill(sample={"temperature": -1})
    assert caught.value.field == "sample.temperature"
    with pytest.raises(errors.InvalidInput, match="complex128"):
        session.prefill(query=np.zeros((1, 1, 1), np.complex128))
    with pytest.raises(errors.InvalidInput, match="id"):
        client.sessions.create("decoder", id="no spaces")
    assert len(service.requests) == sent


class Sleeps(list[float]):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def test_what_was_safely_refused_is_sent_again() -> None:
    refused = httpx.ConnectError("refused")
    service = FakeService(refused, problem(Code.QUEUE_FULL, retry_header=3))
    sleeps = Sleeps()
    with Client(transport=service.transport, sleep=sleeps) as client:
        session = client.sessions.create("decoder")
        assert sleeps == [0.1, 3.0]
        service.answers = [problem(Code.POOL_EXHAUSTED, retry_header=1)]
        assert len(list(session.generate(stream=True, max_tokens=2))) == 2
        assert sleeps == [0.1, 3.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.ReadTimeout("slow"), errors.TimedOut),
        (httpx.ReadError("reset"), errors.TransportError),
        (httpx.RemoteProtocolError("no reply"), errors.TransportError),
        (problem(Code.MODEL_FAILED, retry_header=1), errors.ModelFailed),
        (problem(Code.WRONG_STATE, retry_header=1), errors.WrongState),
        (problem(Code.QUEUE_FULL), errors.QueueFull),
        (problem(Code.QUEUE_FULL, retry_header=3600), errors.QueueFull),
    ],
)
def test_nothing_else_is_sent_again(answer: httpx.Response | Exception, error: type[errors.KeypastError]) -> None:
    """Without a key, as a service of another kind might be asked."""
    service = FakeService(answer)
    call = _protocol.post("/v1/sessions", schemas.CreateSession(model="decoder"), schemas.SessionView)
    with Client(transport=service.transport, sleep=Sleeps()) as client, pytest.raises(error):
        client.send(call)
    assert len(service.requests) == 1


LOST = [httpx.ReadError("reset"), httpx.RemoteProtocolError("no reply"), httpx.ReadTimeout("slow")]


@pytest.mark.parametrize("loss", LOST, ids=lambda loss: type(loss).__name__)
def test_a_lost_reply_is_asked_for_again_and_nothing_is_done_twice(loss: Exception) -> None:
    service, sleeps = FakeService(), Sleeps()
    with Client(transport=service.transport, sleep=sleeps) as client:

        def twice(action: Callable[[], Any]) -> Any:
            service.lost, sent = [loss], len(service.requests)
            result = action()
            first, again = service.requests[sent:]
            assert first.headers["Idempotency-Key"] == again.headers["Idempotency-Key"]
            assert (first.content, first.headers.get("If-Match")) == (again.content, again.headers.get("If-Match"))
            return result

        session = twice(lambda: client.sessions.create("decoder"))
        assert len(service.sessions) == 1
        prefilled = twice(lambda: session.prefill(text="The", expect_version=True))
        assert (prefilled.replayed, prefilled.version, prefilled.valid_length) == (True, 1, [3])
        assert twice(lambda: session.step(token_ids=[[5]])).valid_length == [4]
        generated = twice(lambda: session.generate(max_tokens=2))
        assert (generated.replayed, generated.outputs.text) == (True, ["Pa"])
        assert "replayed" not in generated.model_dump_json()
        child = twice(lambda: session.fork(at=3))
        assert len(service.sessions) == 2
        twice(lambda: session.truncate(0))
        past = Past({"token_ids": np.ones((1, 2), np.int64)}, [2], "decoder", "f")
        twice(lambda: session.load_past(past))
        assert (session.version, session.valid_length) == (6, [2])
        assert twice(session.delete).positions == 2
        assert twice(lambda: client.sessions.delete(child.id)).positions == 3
    keys = [request.headers["Idempotency-Key"] for request in service.requests]
    assert len(set(keys)) == len(keys) / 2 == 9
    assert sleeps == [0.1] * 9


def test_what_reads_or_only_says_how_things_shall_be_is_sent_again_without_a_key() -> None:
    service = FakeService()
    with Client(transport=service.transport, sleep=Sleeps()) as client:
        session = client.sessions.create("decoder")
        session.prefill(text="The")
        calls: list[Callable[[], Any]] = [
            session.refresh,
            client.capacity,
            session.past,
            lambda: session.score(token_ids=[[1]]),
            lambda: session.update(pinned=True),
        ]
        for call in calls:
            service.answers, sent = [httpx.ReadError("reset")], len(service.requests)
            call()
            assert [request.headers.get("Idempotency-Key") for request in service.requests[sent:]] == [None, None]


def test_a_stream_whose_beginning_was_lost_is_opened_again() -> None:
    service = FakeService()
    with Client(transport=service.transport, sleep=Sleeps()) as client:
        session = client.sessions.create("decoder")
        session.prefill(text="The")
        service.answers = [httpx.ReadError("reset")]
        with session.generate(stream=True, max_tokens=2) as tokens:
            assert [token.text for token in tokens] == ["P", "a"]
            assert tokens.replayed is False
    first, again = service.requests[-2:]
    assert first.headers["Idempotency-Key"] == again.headers["Idempotency-Key"]


def test_a_proxy_that_had_no_answer_has_lost_the_reply() -> None:
    for status, tries in ((502, 2), (504, 2), (500, 1)):
        service = FakeService(httpx.Response(status, content=b"<html>"))
        with Client(transport=service.transport, sleep=Sleeps()) as client:
            failed = pytest.raises(errors.ServerError) if status == 500 else nullcontext()
            with failed:
                client.sessions.create("decoder")
        assert len(service.requests) == tries


def test_a_key_of_the_callers(client: Client, service: FakeService) -> None:
    session = client.sessions.create("decoder", idempotency_key="mine")
    session.prefill(text="a", idempotency_key="first")
    again = session.prefill(text="a", idempotency_key="first")
    assert (again.replayed, service.sessions[session.id].lengths) == (True, [1])
    for key in ("", "a b", "x" * 256, "é"):
        with pytest.raises(errors.InvalidInput) as refused:
            session.step(token_ids=[[1]], idempotency_key=key)
        assert refused.value.field == "idempotency_key"


def test_the_tries_end() -> None:
    service = FakeService(*[httpx.ConnectError("refused")] * 5)
    sleeps = Sleeps()
    with Client(transport=service.transport, sleep=sleeps, retries=Retries(limit=3)) as client:
        with pytest.raises(errors.ConnectFailed, match="refused"):
            client.version()
        assert sleeps == [0.1, 0.2, 0.4]


class Dumb(BaseHTTPRequestHandler):
    """Sends half of the body it promises."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"{")

    def log_message(self, *args: object) -> None:
        pass


def test_half_a_reply_over_a_real_socket() -> None:
    with HTTPServer(("127.0.0.1", 0), Dumb) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            broke = pytest.raises(errors.TransportError, match="connection broke")
            with Client(f"http://127.0.0.1:{server.server_port}") as client, broke:
                client.version()
        finally:
            server.shutdown()
            thread.join()
