"""Prometheus' view of the service. Nothing is kept here: engine and traffic have the numbers, each scrape shows them.

Names: OpenTelemetry's where it has one (http.server..., gen_ai.server..., dots and units as Prometheus writes them),
else `keypast_`. Units are seconds and bytes. Labels are of the service's making: models, routes, operations, states.
Never a session, a tenant, or a text that a client chose.
"""

import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from engine.tally import Figures, Histogram
from service.lifecycle import Service
from service.traffic import Traffic

GEN_AI = ["gen_ai_provider_name", "gen_ai_operation_name", "gen_ai_request_model"]
PROVIDER = "keypast"


class Exposition:
    """What `GET /metrics` answers; on any thread."""

    def __init__(self, service: Service, traffic: Traffic) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Numbers(service, traffic))
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The body and its content type: OpenMetrics for who accepts it, else Prometheus' own text."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Numbers(Collector):
    def __init__(self, service: Service, traffic: Traffic) -> None:
        self._service = service
        self._traffic = traffic
        self._build = {"version": version("keypast"), "python": platform.python_version(), "torch": _version("torch")}

    def describe(self) -> Iterable[Metric]:
        return ()  # each scrape says what there is

    def collect(self) -> Iterator[Metric]:
        yield _gauge("keypast_build_info", "Versions; always 1.", [*self._build], [([*self._build.values()], 1)])
        ready = self._service.status == "ready"
        yield _gauge("keypast_ready", "1 when new work is taken: not loading, draining or down.", [], [([], ready)])
        yield from _traffic(self._traffic)
        figures = self._service.figures()
        yield from _held(figures)
        yield from _done(figures)
        yield from _generated(figures)


def _traffic(traffic: Traffic) -> Iterator[Metric]:
    yield _gauge("keypast_active_requests", "Requests that are being answered.", [], [([], traffic.active)])
    yield _histogram(
        "http_server_request_duration_seconds",
        "Requests by their route, from their head to the end of the reply. Status 499: the client left.",
        ["http_request_method", "http_route", "http_response_status_code"],
        [([method, route, str(status)], times) for (method, route, status), times in traffic.requests()],
    )
    yield _counter(
        "keypast_errors_total",
        "Problems that clients were told, by their code; also those of a batch's items and inside streams.",
        ["error_type"],
        [([code], count) for code, count in traffic.problems().items()],
    )


def _held(figures: Sequence[Figures]) -> Iterator[Metric]:
    """What there is now."""
    each = [(one.spec.name, one) for one in figures]
    yield _gauge(
        "keypast_model_info",
        "Models that are served; always 1.",
        ["model", "kind", "dtype", "device", "fingerprint"],
        [([name, m.spec.kind, m.spec.dtype, m.spec.device, m.spec.fingerprint], 1) for name, m in each],
    )
    yield _gauge(
        "keypast_blocks",
        "Blocks of a model's pool. Used ones are held by sessions or by appends that run.",
        ["model", "state"],
        [([name, s], n) for name, m in each for s, n in (("free", m.capacity.free), ("used", m.capacity.used))],
    )
    yield _gauge(
        "keypast_shared_blocks",
        "Used blocks that more than one session holds.",
        ["model"],
        [([name], one.capacity.shared) for name, one in each],
    )
    yield _gauge(
        "keypast_reserved_blocks",
        "Used blocks of appends that run, for positions that are not committed yet.",
        ["model"],
        [([name], one.capacity.reserved) for name, one in each],
    )
    yield _gauge(
        "keypast_block_bytes",
        "Bytes of keys and values in one block.",
        ["model"],
        [([name], one.capacity.block_bytes) for name, one in each],
    )
    yield _gauge(
        "keypast_sessions",
        "Sessions; a running one has an operation whose turn has come.",
        ["model", "state"],
        [([name, state], count) for name, one in each for state, count in one.sessions.items()],
    )
    yield _gauge(
        "keypast_operations",
        "Operations that have not ended; a running one has been in a batch.",
        ["model", "state"],
        [([name, s], n) for name, m in each for s, n in (("running", m.running), ("waiting", m.waiting))],
    )


def _done(figures: Sequence[Figures]) -> Iterator[Metric]:
    """What has been done since the start."""
    yield _counter(
        "keypast_session_events_total",
        "What happened to sessions: created, forked, committed, evicted and so on.",
        ["model", "event"],
        [([one.spec.name, event], count) for one in figures for event, count in one.events.items()],
    )
    done = [([one.spec.name, name], done) for one in figures for name, done in one.tally.done.items()]
    yield _counter(
        "keypast_positions_total",
        "Positions (tokens, of a decoder) that operations appended, scored or moved.",
        ["model", "operation"],
        [(labels, one.positions) for labels, one in done],
    )
    yield _counter(
        "keypast_reused_positions_total",
        "Positions of the past that an operation found and did not compute again.",
        ["model", "operation"],
        [(labels, one.reused) for labels, one in done],
    )
    yield _histogram(
        "keypast_queue_seconds",
        "From an operation's turn in its session to its first batch.",
        ["model", "operation"],
        [(labels, one.queued) for labels, one in done],
    )
    ran = [([one.spec.name, phase], ran) for one in figures for phase, ran in one.tally.ran.items()]
    yield _histogram(
        "keypast_batch_seconds",
        "One turn of the model. A step batch has one position a row at most; a transfer moves a past in or out.",
        ["model", "phase"],
        [(labels, one.seconds) for labels, one in ran],
    )
    yield _histogram(
        "keypast_batch_rows",
        "Rows of one batch.",
        ["model", "phase"],
        [(labels, one.rows) for labels, one in ran],
    )


def _generated(figures: Sequence[Figures]) -> Iterator[Metric]:
    """OpenTelemetry's figures of a model server, and the gaps between tokens."""
    yield _histogram(
        "gen_ai_server_request_duration_seconds",
        "Operations that ended well, from their turn in their session to their end.",
        GEN_AI,
        [([PROVIDER, n, m.spec.name], done.seconds) for m in figures for n, done in m.tally.done.items()],
    )
    drawing = [one for one in figures if one.spec.history is not None]
    yield _histogram(
        "gen_ai_server_time_to_first_token_seconds",
        "Until the first token: of a generation until it is committed, of a prefill that draws one until its end.",
        GEN_AI,
        [([PROVIDER, n, m.spec.name], times) for m in drawing for n, times in m.tally.first_token.items()],
    )
    yield _histogram(
        "gen_ai_server_time_per_output_token_seconds",
        "Mean time between the tokens of a generation, one value a generation.",
        GEN_AI,
        [([PROVIDER, "generate", one.spec.name], one.tally.token_mean) for one in drawing],
    )
    yield _histogram(
        "keypast_inter_token_seconds",
        "Time between two tokens of a generation, one value a token.",
        ["model"],
        [([one.spec.name], one.tally.token_gap) for one in drawing],
    )


def _gauge(name: str, told: str, labels: list[str], series: Iterable[tuple[list[str], float]]) -> Metric:
    family = GaugeMetricFamily(name, told, labels=labels)
    for values, number in series:
        family.add_metric(values, number)
    return family


def _counter(name: str, told: str, labels: list[str], series: Iterable[tuple[list[str], float]]) -> Metric:
    family = CounterMetricFamily(name, told, labels=labels)
    for values, number in series:
        family.add_metric(values, number)
    return family


def _histogram(name: str, told: str, labels: list[str], series: Iterable[tuple[list[str], Histogram]]) -> Metric:
    family = HistogramMetricFamily(name, told, labels=labels)
    for values, histogram in series:
        bounds = [*map(str, histogram.bounds), "+Inf"]
        family.add_metric(values, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.total)
    return family


def _version(package: str) -> str:
    """Without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
