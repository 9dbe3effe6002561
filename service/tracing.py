"""Requests as OpenTelemetry tells of them: a span each, and one for every stop of its life. The only module that knows
OpenTelemetry; imported when it is asked for.

    POST /v1/sessions/{session_id}/step  |---------------------------------------------------|
      receive     head, key, body        |---|
      step                                   |------------------------------------------|
        admission   its session's turn       |---|
        queue       its first batch              |-----|
        compute     its batches                        |-------------------------|
        commit                                                                   |------|
      reply       encode, send                                                          |----|

The engine reads its clock anyway (`engine.trail`), the request's beginning and end are read by the same one, and spans
are made of that when the reply is out. They have routes, statuses, lengths, times and ids, and nothing that a
request or its reply says.
"""

import asyncio
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import version
from itertools import pairwise

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from engine.batch import AppendResult, Generate, GenerateResult, Operation, Truncate
from engine.clock import now
from engine.engine import Engine
from engine.errors import EngineError
from engine.tally import operation_name
from engine.trail import Trail
from service.errors import problem_of
from service.logs import LONGEST_PATH, PROBES, logger
from service.metrics import PROVIDER
from service.settings import Settings
from service.traffic import METHODS, OTHER, Traffic
from service.worker import Desk, tell

SEND_SECONDS = 10.0  # for one batch of spans to reach the collector, all tries together
CLOSE_SECONDS = 3.0  # for the last ones
MOST_OPERATIONS = 64  # of one request that have spans; a batch of steps may have more

STOPS = ("admission", "queue", "compute", "commit")

Value = str | int | float | bool | list[str]


@dataclass(slots=True)
class _Noted:
    operation: Operation
    trail: Trail
    at: float  # it was submitted
    refusal: Exception | None = None  # then and there

    @property
    def failure(self) -> BaseException | None:
        future = self.operation.future
        return self.refusal or (future.exception() if future.done() and not future.cancelled() else None)

    @property
    def ended(self) -> float | None:
        """When it did what it could; None: nobody has written it down."""
        return self.at if self.refusal else self.trail.committed or self.trail.computed


@dataclass(slots=True)
class _Request:
    """What one has asked of the engine so far."""

    began: float = field(default_factory=now)
    noted: list[_Noted] = field(default_factory=list)
    operations: int = 0

    def note(self, operation: Operation) -> _Noted | None:
        self.operations += 1
        if self.operations > MOST_OPERATIONS:
            return None
        operation.trail = trail = Trail()
        noted = _Noted(operation, trail, now())
        self.noted.append(noted)
        return noted


_request: ContextVar[_Request | None] = ContextVar("request", default=None)


def _note(operation: Operation) -> _Noted | None:
    request = _request.get()
    return None if request is None else request.note(operation)


class _Desk:
    """Notes which request asks for what."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def submit(self, operation: Operation) -> None:
        noted = _note(operation)
        try:
            self._engine.submit(operation)
        except Exception as error:
            if noted is not None:
                noted.refusal = error
            raise

    def submit_all(self, operations: Sequence[Operation]) -> list[EngineError | None]:
        noted = list(map(_note, operations))
        refused = self._engine.submit_all(operations)
        for one, error in zip(noted, refused, strict=True):
            if one is not None:
                one.refusal = error
        return refused


class Tracing:
    """Gives spans to `exporter`, from a thread of its own: a collector that is slow or away costs spans, and no request
    waits for it. `share` of the requests are traced whose caller does not say (`traceparent`) whether it wants that."""

    def __init__(self, exporter: SpanExporter, share: float = 1.0, close_seconds: float = CLOSE_SECONDS) -> None:
        own = Resource.create({"service.name": "keypast", "service.version": version("keypast")})
        self._provider = TracerProvider(
            ParentBased(TraceIdRatioBased(share)), own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("keypast", version("keypast"))
        self._close_seconds = close_seconds
        self._callers = TraceContextTextMapPropagator()
        self.traffic: Traffic = _Traffic(self)

    @classmethod
    def to(cls, settings: Settings) -> "Tracing":
        """The collector at `otlp_endpoint`."""
        url = settings.otlp_endpoint.rstrip("/").removesuffix("/v1/traces")
        return cls(OTLPSpanExporter(f"{url}/v1/traces", timeout=SEND_SECONDS), settings.otlp_share)

    def desk(self, engine: Engine) -> Desk:
        return _Desk(engine)

    async def close(self) -> None:
        """Sends what is left, if that can be done soon."""
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def close() -> None:
            self._provider.shutdown()
            tell(loop, closed.set)

        threading.Thread(target=close, name="tracing", daemon=True).start()
        try:
            async with asyncio.timeout(self._close_seconds):
                await closed.wait()
        except TimeoutError:
            logger.warning("the collector of spans does not answer; the last ones are lost")

    def ended(self, scope: Scope, method: str, status: int) -> None:
        """Makes the spans of a request that is answered just now. Of a probe there are none."""
        request = _request.get()
        if request is None or scope["path"] in PROBES:
            return
        began, ended = request.began, now()
        span = self._server_span(scope, method, status, began)
        if span.is_recording():
            codes: Sequence[str] = scope["state"].get("problems", ())
            self._stops(request, set_span_in_context(span, Context()), began, ended, codes)
            span.set_attribute("keypast.operations", request.operations)
            if codes or status >= HTTPStatus.BAD_REQUEST:
                span.set_attribute("error.type", codes[-1] if codes else str(status))
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR or any(map(_is_ours, request.noted)):
                span.set_status(StatusCode.ERROR)  # not for what a client did wrong: a server's span is none of that
        span.end(_ns(ended))
        request.noted.clear()

    def _server_span(self, scope: Scope, method: str, status: int, began: float) -> Span:
        route = getattr(scope.get("route"), "path", None)
        caller = scope["state"].get("caller")
        attributes: dict[str, Value] = {
            "http.request.method": method if method in METHODS else OTHER,
            "url.scheme": scope["scheme"],
            "url.path": scope["path"][:LONGEST_PATH],
            "http.response.status_code": status,
            "keypast.request_id": scope["state"]["request_id"],
        }
        if route is not None:
            attributes["http.route"] = route
        if caller is not None and caller.key_id is not None:
            attributes["keypast.tenant"] = caller.tenant
        name = " ".join(filter(None, (method if method in METHODS else "HTTP", route)))
        parent = self._callers.extract(_trace_headers(scope), Context())
        return self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=_ns(began))

    def _stops(self, request: _Request, inside: Context, began: float, ended: float, codes: Sequence[str]) -> None:
        noted = request.noted
        if noted:
            self._span("receive", inside, began, noted[0].at)
            last = max([self._operation(one, inside, ended) for one in noted])
            self._span("reply", inside, last, ended)
        elif codes:
            self._span("receive", inside, began, ended, codes[-1])

    def _operation(self, noted: _Noted, inside: Context, replied: float) -> float:
        """Makes an operation's spans. When it ended."""
        failure, trail = noted.failure, noted.trail
        code = None if failure is None else problem_of(failure).code
        ended = min(noted.ended or replied, replied)
        attributes = _attributes(noted)
        name = str(attributes["gen_ai.operation.name"])
        span = self._tracer.start_span(name, inside, attributes=attributes, start_time=_ns(noted.at))
        inside = set_span_in_context(span, Context())
        stops = _stops_of(noted, ended)
        for label, begins, ends in stops:
            first_token = trail.first_token if label == "compute" else None
            self._span(label, inside, begins, ends, code if label == stops[-1][0] else None, first_token)
        _end(span, ended, code)
        return ended

    def _span(
        self,
        name: str,
        inside: Context,
        begins: float,
        ends: float,
        code: str | None = None,
        first_token: float | None = None,
    ) -> None:
        """`code`: of what it failed with."""
        span = self._tracer.start_span(name, inside, start_time=_ns(begins))
        if first_token is not None:
            span.add_event("first_token", timestamp=_ns(first_token))
        _end(span, max(begins, ends), code)


class _Traffic(Traffic):
    def __init__(self, tracing: Tracing) -> None:
        super().__init__()
        self._tracing = tracing

    def began(self) -> None:
        super().began()
        _request.set(_Request())

    def ended(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        super().ended(scope, method, status, seconds)
        try:
            self._tracing.ended(scope, method, status)
        except Exception:  # who looks on must not disturb
            logger.exception("the spans of request %s cannot be made", scope["state"]["request_id"])


def _stops_of(noted: _Noted, ended: float) -> list[tuple[str, float, float]]:
    """As far as it came, and until when."""
    trail = noted.trail
    times = (noted.at, trail.turn, trail.scheduled, trail.computed, trail.committed)
    stops = []
    for label, (begins, ends) in zip(STOPS, pairwise(times), strict=True):
        if begins is not None and not (ends is None and label == STOPS[-1]):
            stops.append((label, begins, ended if ends is None else ends))
    return stops


def _attributes(noted: _Noted) -> dict[str, Value]:
    operation, trail, future = noted.operation, noted.trail, noted.operation.future
    told: dict[str, Value] = {
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.operation.name": _name_of(operation),
        "gen_ai.conversation.id": operation.session_id[:LONGEST_PATH],
        "keypast.batches": trail.batches,
    }
    if trail.model:
        told["gen_ai.request.model"] = trail.model
    if operation.once is not None and operation.once.replayed:
        told["keypast.replayed"] = True
    result = future.result() if future.done() and not future.cancelled() and future.exception() is None else None
    if isinstance(result, AppendResult | GenerateResult):
        told["keypast.rows"] = len(result.valid_length)
        told["keypast.computed_positions"] = sum(result.effort.computed)
        told["keypast.reused_positions"] = sum(result.effort.reused)
        told["keypast.compute_seconds"] = result.compute_ms / 1e3
    if isinstance(operation, Generate):
        told["gen_ai.request.max_tokens"] = operation.max_tokens
        if trail.first_token is not None:
            told["gen_ai.response.time_to_first_chunk"] = trail.first_token - noted.at
    if isinstance(result, GenerateResult):
        drawn = sum(map(len, result.token_ids))
        told["gen_ai.usage.input_tokens"] = sum(result.valid_length) - drawn
        told["gen_ai.usage.output_tokens"] = drawn
        told["gen_ai.usage.cache_read.input_tokens"] = sum(result.effort.reused)
        told["gen_ai.response.finish_reasons"] = [str(reason) for reason in result.finish_reason]
    return told


def _name_of(operation: Operation) -> str:
    if isinstance(operation, Generate | Truncate):
        return "generate" if isinstance(operation, Generate) else "truncate"
    return operation_name(operation)


def _is_ours(noted: _Noted) -> bool:
    """Whether it failed through the service's own fault."""
    return noted.failure is not None and problem_of(noted.failure).status >= HTTPStatus.INTERNAL_SERVER_ERROR


def _end(span: Span, ends: float, code: str | None) -> None:
    if code is not None:
        span.set_status(StatusCode.ERROR)
        span.set_attribute("error.type", code)
    span.end(_ns(ends))


def _trace_headers(scope: Scope) -> dict[str, list[str]]:
    """The caller's; two of them are none."""
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        if name in (b"traceparent", b"tracestate"):
            found.setdefault(name.decode(), []).append(value.decode("latin-1"))
    return found if len(found.get("traceparent", ())) == 1 else {}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
