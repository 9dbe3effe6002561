"""The real server and a small collector that speaks OTLP over HTTP: what a trace is on the wire."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.e2e.test_server import ROOT, Server
from tests.service.fakes import KINDS, event_data

QUICK = "tests.e2e.quick_service"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
LETTERS = KINDS["decoder"]


class Collector:
    """`spans` and their service's name, as they came."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.take(self.path, self.rfile.read(int(self.headers["content-length"])))
                body = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # as its base has it
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def take(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            told = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.services.add(told["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def named(self, name: str) -> Span:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def below(self, parent: Span) -> list[Span]:
        own = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return sorted(own, key=lambda span: span.start_time_unix_nano)


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


def told(span: Span) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in span.attributes}


def test_a_collector_is_sent_the_life_of_every_request(collector: Collector) -> None:
    with Server(QUICK, otlp_endpoint=collector.url) as server:
        with httpx.Client(base_url=server.address()) as client:
            path = client.post("/v1/sessions", json={"model": "letters"}).headers["location"]
            assert client.post(f"{path}/prefill", json=LETTERS.json(3)).status_code == 200
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            assert client.post(f"{path}/step", json=LETTERS.json(1), headers=headers).status_code == 200
            reply = client.post(f"{path}/generate", json={"max_tokens": 4, "stream": True})
            assert event_data(reply.text)[-1] == "[DONE]"
            assert client.post("/v1/sessions/nobody/fork", json={}).status_code == 404
            assert client.post(f"{path}/score", json=LETTERS.json(1, poison=True)).status_code == 500
        server.process.send_signal(signal.SIGTERM)  # what is left is sent before the end
        assert server.ends()[0] == 0
    assert (collector.paths, collector.services) == ({"/v1/traces"}, {"keypast"})

    for name, trace, parent in (
        ("prefill", None, b""),
        ("step", TRACE, bytes.fromhex(PARENT)),
        ("generate", None, b""),
    ):
        span = collector.named(f"POST /v1/sessions/{{session_id}}/{name}")
        assert (span.kind, span.parent_span_id) == (Span.SPAN_KIND_SERVER, parent)
        assert trace in (None, span.trace_id.hex())
        receive, operation, answer = collector.below(span)
        stops = collector.below(operation)
        assert [receive.name, operation.name, answer.name] == ["receive", name, "reply"]
        assert [stop.name for stop in stops] == ["admission", "queue", "compute", "commit"]
        assert {one.trace_id for one in (receive, *stops, answer)} == {span.trace_id}
        parts = [receive, *stops, answer]
        edges = [(one.start_time_unix_nano, one.end_time_unix_nano) for one in parts]
        assert (edges[0][0], edges[-1][1]) == (span.start_time_unix_nano, span.end_time_unix_nano)
        assert [begins for begins, _ in edges[1:]] == [ends for _, ends in edges[:-1]]
    assert told(collector.named("generate"))["gen_ai.usage.output_tokens"] == 4
    assert [event.name for one in collector.spans for event in one.events] == ["first_token"]

    refused = collector.named("POST /v1/sessions/{session_id}/fork")
    assert (told(refused)["error.type"], refused.status.code) == ("session_not_found", Status.STATUS_CODE_UNSET)
    assert [one.status.code for one in collector.below(refused)] == [Status.STATUS_CODE_ERROR]
    failed = collector.named("POST /v1/sessions/{session_id}/score")
    assert (told(failed)["error.type"], failed.status.code) == ("model_failed", Status.STATUS_CODE_ERROR)
    assert path.rpartition("/")[2] not in "".join(span.name for span in collector.spans)


@pytest.mark.slow
@pytest.mark.parametrize("listens", [False, True])
def test_a_collector_that_does_not_answer_costs_spans_and_nothing_else(listens: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:  # it takes connections and says nothing
        port = hole.getsockname()[1]
        if not listens:
            hole.close()
        with Server(QUICK, otlp_endpoint=f"http://127.0.0.1:{port}") as server:
            with httpx.Client(base_url=server.address()) as client:
                path = client.post("/v1/sessions", json={"model": "letters"}).headers["location"]
                assert client.post(f"{path}/prefill", json=LETTERS.json(3)).status_code == 200
                began, slowest = time.monotonic(), 0.0
                while time.monotonic() - began < 7:  # past the first try to send, which is after five seconds
                    asked = time.monotonic()
                    assert client.post(f"{path}/score", json=LETTERS.json(1)).status_code == 200
                    slowest = max(slowest, time.monotonic() - asked)
            assert slowest < 1
            server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            code, printed = server.ends(20)
    assert (code, time.monotonic() - began < 6) == (0, True)
    assert "Traceback" not in printed


# ---- without it ------------------------------------------------------------------------------------------------------

BEGIN = """
import sys
from service.server import serve
from service.settings import Settings
from tests.service.fakes import Fakes
"""
WITHOUT_EXTRA = """
sys.modules["opentelemetry.sdk"] = sys.modules["opentelemetry.exporter"] = None
sys.exit(serve(lambda progress: Fakes.build().loaded(), Settings(otlp_endpoint="http://127.0.0.1:4318", port=0)))
"""
OFF = """
from service.app import create_app
create_app(lambda progress: Fakes.build().loaded(), Settings())
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGIN + program]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]}
    )


def test_who_asks_for_traces_without_the_extra_is_told_what_to_do() -> None:
    done = run(WITHOUT_EXTRA)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("keypast: KEYPAST_OTLP_ENDPOINT=http://127.0.0.1:4318: traces need opentelemetry.")
    assert "pip install 'keypast[otel]'" in line


def test_who_does_not_ask_loads_nothing_of_it() -> None:
    assert run(OFF).stdout == "[]\n"
