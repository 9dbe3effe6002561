"""Spans of requests: which there are, whose children, when, and what they say. The exporter keeps them."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from keypast.keys import new_key
from service.tracing import MOST_OPERATIONS, STOPS, Tracing
from service.traffic import Traffic
from tests.service.conftest import Running, Start, until
from tests.service.fakes import KINDS, Kind

pytestmark = pytest.mark.anyio

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = f"00-{TRACE}-{PARENT}-01"
STEP = "POST /v1/sessions/{session_id}/step"
LETTERS = KINDS["decoder"]


class Traced:
    """A service whose spans are kept."""

    def __init__(self, running: Running, exporter: InMemorySpanExporter, tracing: Tracing) -> None:
        self.running = running
        self.client = running.client
        self._exporter = exporter
        self._tracing = tracing

    async def spans(self) -> list[ReadableSpan]:
        """All of them; there are no more after that."""
        await self._tracing.close()
        return list(self._exporter.get_finished_spans())

    async def of(self, name: str) -> "Tree":
        """The only one request of that name."""
        spans = await self.spans()
        (server,) = [span for span in spans if span.kind is SpanKind.SERVER and span.name == name]
        return Tree(server, spans)


class Tree:
    """A span and what is below it."""

    def __init__(self, span: ReadableSpan, spans: Sequence[ReadableSpan]) -> None:
        self.span = span
        own = [one for one in spans if one.parent is not None and one.parent.span_id == span.context.span_id]
        self.children = [Tree(child, spans) for child in sorted(own, key=lambda one: one.start_time or 0)]

    def __getitem__(self, name: str) -> "Tree":
        (found,) = [child for child in self.children if child.span.name == name]
        return found

    @property
    def names(self) -> list[str]:
        return [child.span.name for child in self.children]

    @property
    def told(self) -> dict[str, Any]:
        return dict(self.span.attributes or {})

    @property
    def times(self) -> tuple[int, int]:
        assert self.span.start_time is not None
        assert self.span.end_time is not None
        return self.span.start_time, self.span.end_time

    @property
    def ms(self) -> float:
        return (self.times[1] - self.times[0]) / 1e6

    @property
    def error(self) -> str | None:
        """Its type, when the span's status says that there was one."""
        return str(self.told.get("error.type")) if self.span.status.status_code.name == "ERROR" else None


Trace = Callable[..., Awaitable[Traced]]


@pytest.fixture
def trace(start: Start) -> Trace:
    async def start_traced(share: float = 1.0, **options: Any) -> Traced:
        exporter = InMemorySpanExporter()
        tracing = Tracing(exporter, share)
        return Traced(await start(tracing=tracing, **options), exporter, tracing)

    return start_traced


# ---- one request -----------------------------------------------------------------------------------------------------


async def test_each_stop_begins_where_the_one_before_ended(trace: Trace, kind: Kind) -> None:
    traced = await trace()
    session = await traced.running.prefilled(kind, 3)
    reply = await traced.client.post(f"/v1/sessions/{session}/step", json=kind.json(1, 3))
    tree = await traced.of(STEP)
    assert tree.names == ["receive", "step", "reply"]
    assert tree["step"].names == [*STOPS]
    parts = [tree["receive"], *tree["step"].children, tree["reply"]]
    assert [part.times[0] for part in parts[1:]] == [part.times[1] for part in parts[:-1]]
    assert (parts[0].times[0], parts[-1].times[1]) == tree.times
    assert tree["step"].times == (parts[1].times[0], parts[-2].times[1])
    told = reply.json()["timings"]
    assert tree["step"]["queue"].ms == pytest.approx(told["queue_ms"], abs=0.002)
    assert tree["step"].told["keypast.compute_seconds"] == told["compute_ms"] / 1e3
    assert tree["step"]["compute"].ms > told["compute_ms"] * 0.9


async def test_what_a_request_is_told_as(trace: Trace, kind: Kind) -> None:
    traced = await trace()
    session = await traced.running.prefilled(kind, 3)
    reply = await traced.client.post(f"/v1/sessions/{session}/step", json=kind.json(1, 3))
    tree = await traced.of(STEP)
    assert tree.told == {
        "http.request.method": "POST",
        "http.route": "/v1/sessions/{session_id}/step",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": f"/v1/sessions/{session}/step",
        "keypast.request_id": reply.headers["x-request-id"],
        "keypast.operations": 1,
    }
    told = tree["step"].told
    assert told.pop("keypast.compute_seconds") > 0
    assert told == {
        "gen_ai.provider.name": "keypast",
        "gen_ai.operation.name": "step",
        "gen_ai.request.model": kind.model,
        "gen_ai.conversation.id": session,
        "keypast.batches": 1,
        "keypast.rows": 1,
        "keypast.computed_positions": 1,
        "keypast.reused_positions": 3,
    }
    assert {span.name for span in await traced.spans() if session in span.name} == set()
    assert tree.span.resource.attributes["service.name"] == "keypast"


async def test_what_waits_for_its_session_and_what_is_computed_are_told_apart(trace: Trace) -> None:
    traced = await trace()
    decoder = traced.running.fakes.decoder
    session = await traced.running.prefilled(LETTERS, 3)
    decoder.gate.clear()
    decoder.entered.clear()
    url = f"/v1/sessions/{session}"
    first = asyncio.create_task(traced.client.post(f"{url}/prefill", json=LETTERS.json(2)))
    await until(decoder.entered.is_set)
    second = asyncio.create_task(traced.client.post(f"{url}/step", json=LETTERS.json(1)))
    other = await traced.running.session("letters")
    third = asyncio.create_task(traced.client.post(f"/v1/sessions/{other}/score", json=LETTERS.json(2)))
    await asyncio.sleep(0.06)
    decoder.gate.set()
    assert [reply.status_code for reply in await asyncio.gather(first, second, third)] == [200] * 3
    step = (await traced.of(STEP))["step"]
    score = (await traced.of("POST /v1/sessions/{session_id}/score"))["score"]
    prefills = [Tree(s, await traced.spans()) for s in await traced.spans() if s.name == "prefill"]
    assert max(one["compute"].ms for one in prefills) > 50
    assert step["admission"].ms > 50 > step["queue"].ms + step["compute"].ms
    assert score["queue"].ms > 40 > score["admission"].ms + score["compute"].ms


async def test_a_long_prefill_has_many_batches(trace: Trace) -> None:
    traced = await trace(token_budget=4)
    session = await traced.running.prefilled(LETTERS, 10)
    prefill = (await traced.of("POST /v1/sessions/{session_id}/prefill"))["prefill"]
    assert prefill.told["keypast.batches"] == len(traced.running.fakes.decoder.batches) == 3
    assert prefill.told["gen_ai.conversation.id"] == session
    assert prefill.names == [*STOPS]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_generation(trace: Trace, stream: bool) -> None:
    traced = await trace()
    session = await traced.running.prefilled(LETTERS, 3)
    asked = {"max_tokens": 5, "stream": stream}
    assert (await traced.client.post(f"/v1/sessions/{session}/generate", json=asked)).status_code == 200
    generate = (await traced.of("POST /v1/sessions/{session_id}/generate"))["generate"]
    told = generate.told
    assert told["gen_ai.usage.input_tokens"] == told["gen_ai.usage.cache_read.input_tokens"] == 3
    assert (told["gen_ai.usage.output_tokens"], told["gen_ai.request.max_tokens"]) == (5, 5)
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    assert told["keypast.batches"] == len(traced.running.fakes.decoder.batches) - 1  # the prefill's
    (event,) = generate["compute"].span.events
    begins, ends = generate["compute"].times
    assert event.name == "first_token"
    assert begins < event.timestamp < ends
    seconds = (event.timestamp - generate.times[0]) / 1e9
    assert told["gen_ai.response.time_to_first_chunk"] == pytest.approx(seconds, abs=1e-5)


async def test_openai_clients_requests(trace: Trace) -> None:
    traced = await trace()
    asked = {"model": "letters", "prompt": ["abc", "abcd"], "max_tokens": 2, "n": 2}
    assert (await traced.client.post("/v1/completions", json=asked)).status_code == 200
    tree = await traced.of("POST /v1/completions")
    operations = tree.children[1:-1]
    assert (tree.names[0], tree.names[-1]) == ("receive", "reply")
    assert sorted(one.span.name for one in operations) == [*["generate"] * 4, "prefill", "prefill"]  # choices share one
    generated = [one.told for one in operations if one.span.name == "generate"]
    assert sorted(told["gen_ai.usage.input_tokens"] for told in generated) == [3, 3, 4, 4]
    assert {one.told["gen_ai.request.model"] for one in operations} == {"letters"}


async def test_truncate_export_and_import(trace: Trace) -> None:
    traced = await trace()
    session, empty = await traced.running.prefilled(LETTERS, 3), await traced.running.session("letters")
    client = traced.client
    assert (await client.post(f"/v1/sessions/{session}/truncate", json={"length": 2})).status_code == 200
    past = await client.get(f"/v1/sessions/{session}/past")
    headers = {"content-type": past.headers["content-type"]}
    imported = await client.put(f"/v1/sessions/{empty}/past", content=past.content, headers=headers)
    assert imported.status_code == 200
    truncate = (await traced.of("POST /v1/sessions/{session_id}/truncate"))["truncate"]
    assert truncate.names == ["admission"]
    assert truncate["admission"].times == truncate.times
    for name, verb in (("export", "GET"), ("import", "PUT")):
        assert (await traced.of(f"{verb} /v1/sessions/{{session_id}}/past"))[name].names == [*STOPS]


async def test_what_was_done_before_is_not_computed_again(trace: Trace) -> None:
    traced = await trace()
    session = await traced.running.session("letters")
    for _ in range(2):
        url, headers = f"/v1/sessions/{session}/prefill", {"idempotency-key": "hush"}
        assert (await traced.client.post(url, json=LETTERS.json(2), headers=headers)).status_code == 200
    spans = await traced.spans()
    first, again = [Tree(span, spans) for span in spans if span.name == "prefill"]
    assert ("keypast.replayed" in first.told, again.told["keypast.replayed"]) == (False, True)
    assert (first.names, again.names) == ([*STOPS], ["admission"])


async def test_a_batch_of_steps_has_an_operation_an_item(trace: Trace) -> None:
    traced = await trace(blocks=200)
    sessions = [await traced.running.prefilled(LETTERS, 1) for _ in range(3)]
    items = [{"session_id": session, **LETTERS.json(1)} for session in [*sessions, "nobody"]]
    assert (await traced.client.post("/v1/batch/step", json={"items": items})).is_success
    tree = await traced.of("POST /v1/batch/step")
    assert tree.names == ["receive", *["step"] * 4, "reply"]
    assert [one.error for one in tree.children[1:-1]] == [None, None, None, "session_not_found"]
    assert (tree.error, tree.told["keypast.operations"]) == (None, 4)


async def test_a_request_has_so_many_spans_and_no_more(trace: Trace) -> None:
    traced = await trace(blocks=200)
    session = await traced.running.prefilled(LETTERS, 1)
    items = [{"session_id": f"{session}{i}", **LETTERS.json(1)} for i in range(MOST_OPERATIONS + 5)]
    assert (await traced.client.post("/v1/batch/step", json={"items": items})).is_success
    tree = await traced.of("POST /v1/batch/step")
    assert tree.names.count("step") == MOST_OPERATIONS
    assert tree.told["keypast.operations"] == MOST_OPERATIONS + 5


async def test_a_reader_who_leaves(trace: Trace) -> None:
    traced = await trace()
    decoder = traced.running.fakes.decoder
    session = await traced.running.prefilled(LETTERS, 3)
    decoder.hold(2)
    asked = {"max_tokens": 50, "stream": True}
    task = asyncio.create_task(traced.client.post(f"/v1/sessions/{session}/generate", json=asked))
    await until(decoder.held.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    decoder.gate.set()
    await until(lambda: traced.running.fakes.engine.idle)
    tree = await traced.of("POST /v1/sessions/{session_id}/generate")
    assert tree.names == ["receive", "generate", "reply"]
    assert "gen_ai.usage.output_tokens" not in tree["generate"].told


# ---- whose it is -----------------------------------------------------------------------------------------------------


async def test_a_callers_trace_goes_on(trace: Trace) -> None:
    traced = await trace(share=0.0)  # who says that it wants a trace has one
    await traced.client.get("/version")
    headers = {"traceparent": CALLER, "tracestate": "vendor=1"}
    await traced.client.get("/v1/models", headers=headers)
    (span,) = await traced.spans()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.context.trace_state.to_header() == "vendor=1"


async def test_a_caller_who_wants_no_trace_has_none(trace: Trace) -> None:
    traced = await trace()
    session = await traced.running.prefilled(LETTERS, 1)
    headers = {"traceparent": CALLER.removesuffix("01") + "00"}
    reply = await traced.client.post(f"/v1/sessions/{session}/step", json=LETTERS.json(1), headers=headers)
    assert reply.status_code == 200
    assert [span.name for span in await traced.spans() if span.name == STEP] == []


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "00-garbage")],
        [("traceparent", f"00-{'0' * 32}-{PARENT}-01")],
        [("traceparent", CALLER), ("traceparent", CALLER)],
        [("traceparent", "\xff" * 300)],
    ],
)
async def test_what_is_no_trace_begins_a_new_one(trace: Trace, headers: list[tuple[str, str]]) -> None:
    traced = await trace()
    raw = httpx.Headers([(name.encode(), value.encode("latin-1")) for name, value in headers])
    assert (await traced.client.get("/version", headers=raw)).status_code == 200
    (span,) = await traced.spans()
    assert (span.parent, f"{span.context.trace_id:032x}" == TRACE) == (None, False)


async def test_requests_at_a_time_are_not_mixed_up(trace: Trace) -> None:
    traced = await trace(blocks=200)
    sessions = [await traced.running.prefilled(LETTERS, n + 1) for n in range(8)]
    steps = (traced.client.post(f"/v1/sessions/{session}/step", json=LETTERS.json(1)) for session in sessions)
    assert {reply.status_code for reply in await asyncio.gather(*steps)} == {200}
    spans = await traced.spans()
    trees = [Tree(span, spans) for span in spans if span.name == STEP]
    assert len({tree.span.context.trace_id for tree in trees}) == 8
    told = {tree.told["url.path"]: tree["step"].told["gen_ai.conversation.id"] for tree in trees}
    assert told == {f"/v1/sessions/{session}/step": session for session in sessions}


# ---- what goes wrong -------------------------------------------------------------------------------------------------


async def test_a_refusal_of_the_engine_stands_where_it_was_made(trace: Trace, kind: Kind) -> None:
    traced = await trace()
    reply = await traced.client.post("/v1/sessions/nobody/step", json=kind.json(1))
    assert reply.status_code == 404
    tree = await traced.of(STEP)
    assert (tree.told["http.response.status_code"], tree.told["error.type"]) == (404, "session_not_found")
    assert tree.error is None  # the server did what it should
    assert tree["step"].error == tree["step"]["admission"].error == "session_not_found"


async def test_a_refusal_before_the_engine(trace: Trace) -> None:
    traced = await trace()
    session = await traced.running.session("letters")
    reply = await traced.client.post(f"/v1/sessions/{session}/step", content=b"{")
    assert reply.status_code == 400
    tree = await traced.of(STEP)
    assert (tree.names, tree["receive"].error) == (["receive"], "malformed")
    assert (tree.error, tree.told["error.type"]) == (None, "malformed")
    assert tree["receive"].times == tree.times


async def test_a_model_that_fails(trace: Trace, kind: Kind) -> None:
    traced = await trace()
    session = await traced.running.prefilled(kind, 1)
    reply = await traced.client.post(f"/v1/sessions/{session}/step", json=kind.json(1, 1, poison=True))
    assert reply.status_code == 500
    tree = await traced.of(STEP)
    assert tree.error == tree["step"].error == tree["step"]["compute"].error == "model_failed"
    assert [tree["step"][name].error for name in ("admission", "queue")] == [None, None]
    assert tree["step"].names == ["admission", "queue", "compute"]
    shown = "".join(span.to_json() for span in await traced.spans())
    assert "poisoned" not in shown
    assert "/secret" not in shown


async def test_a_stream_that_fails_says_so_although_its_status_is_200(trace: Trace) -> None:
    traced = await trace()
    session = await traced.running.prefilled(LETTERS, 1)
    traced.running.fakes.decoder.after = {97: 98, 98: 13}
    asked = {"max_tokens": 5, "stream": True}
    assert (await traced.client.post(f"/v1/sessions/{session}/generate", json=asked)).status_code == 200
    tree = await traced.of("POST /v1/sessions/{session_id}/generate")
    assert tree.told["http.response.status_code"] == 200
    assert tree.error == tree["generate"].error == tree["generate"]["compute"].error == "model_failed"


async def test_no_blocks_in_time(trace: Trace) -> None:
    traced = await trace(blocks=4, wait_seconds=0.05)
    await traced.running.prefilled(LETTERS, 9)
    other = await traced.running.session("letters")
    reply = await traced.client.post(f"/v1/sessions/{other}/prefill", json=LETTERS.json(9))
    assert reply.status_code == 429
    spans = await traced.spans()
    (refused,) = [Tree(s, spans) for s in spans if s.name == "prefill" and not s.status.is_ok]
    assert refused.names == ["admission", "queue"]
    assert refused["queue"].error == "pool_exhausted"
    assert refused["queue"].ms > 40


async def test_routes_that_are_none_and_methods_that_are_unknown(trace: Trace) -> None:
    traced = await trace()
    await traced.client.request("BREW", "/v1/sessions/secret-word/pot")
    tree = await traced.of("HTTP")
    assert tree.told["http.request.method"] == "_OTHER"
    assert ("http.route" in tree.told, tree["receive"].error) == (False, "not_found")


# ---- what is not told, and to whom -----------------------------------------------------------------------------------


async def test_nothing_of_what_was_said_and_no_key(trace: Trace) -> None:
    key, record = new_key("alice", "user")
    traced = await trace(settings={"keys": record.line()})
    client = traced.client
    client.headers["authorization"] = f"Bearer {key}"
    body = {"model": "letters", "messages": [{"role": "user", "content": "unspeakable"}], "max_tokens": 3}
    headers = {"idempotency-key": "unspeakable", "x-api-key": key, "user-agent": "unspeakable"}
    reply = await client.post("/v1/chat/completions?word=unspeakable", json=body, headers=headers)
    assert reply.status_code == 200
    said = reply.json()["choices"][0]["message"]["content"]
    tree = await traced.of("POST /v1/chat/completions")
    assert (tree.told["keypast.tenant"], tree["generate"].told["gen_ai.usage.output_tokens"]) == ("alice", 3)
    shown = "".join(span.to_json() for span in await traced.spans())
    assert all(word not in shown for word in ("unspeakable", key, said, record.id))


async def test_probes_are_not_traced(trace: Trace) -> None:
    traced = await trace()
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        assert (await traced.client.get(path)).status_code == 200
    assert await traced.spans() == []


async def test_requests_are_counted_as_ever(trace: Trace) -> None:
    traced = await trace()
    await traced.client.get("/version")
    shown = (await traced.client.get("/metrics")).text
    assert 'http_route="/version"' in shown
    assert "keypast_active_requests 1.0" in shown  # this one


async def test_without_tracing_there_is_nothing_in_between(start: Start) -> None:
    running = await start()
    assert type(running.app.state.traffic) is Traffic
    assert running.service.worker.desk is running.fakes.engine


class Stuck(SpanExporter):
    """A collector that takes its time."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.go_on.wait(20)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.go_on.set()


async def test_a_collector_that_hangs_holds_nobody_up(start: Start) -> None:
    exporter = Stuck()
    tracing = Tracing(exporter, close_seconds=0.2)
    running = await start(tracing=tracing)
    session = await running.prefilled(LETTERS, 1)
    closing = asyncio.create_task(tracing.close())
    await until(exporter.asked.is_set)
    assert (await running.client.post(f"/v1/sessions/{session}/step", json=LETTERS.json(1))).status_code == 200
    began = time.monotonic()
    await closing
    assert time.monotonic() - began < 2
    assert not exporter.go_on.is_set()
    exporter.go_on.set()
