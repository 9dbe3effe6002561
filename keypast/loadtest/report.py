"""The result of a run: one JSON document, of which the table, the CSV and the plots are views."""

import csv
import io
import math
import os
from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from hdrh.histogram import HdrHistogram
from pydantic import BaseModel, ConfigDict, ValidationError
from rich import box
from rich.table import Table

from keypast._machine import processor
from keypast.loadtest.check import Checked
from keypast.loadtest.record import PAPERWORK, QUANTILES, Snapshot, Values, by_name, merged, summary
from keypast.loadtest.run import Run
from keypast.loadtest.scenario import first_error

FORMAT = 1
ORDER = ("turn", "ttft", "inter_token", "prefill", "step", "fork", "request", "queue", "compute", *PAPERWORK, "late")
TOLD = ("p50", "p95", "p99")  # of each point of the time series
BUSY = 0.85  # of a core, from where on a worker may be what is measured
LATE = 5.0  # ms, p99
MANY = 100  # requests, from where on a p99 says something
CURVE = [round(100 * (1 - 10 ** (-step / 12)), 5) for step in range(49)]  # percentiles up to 99.99, closer to the end


class Held(BaseModel):
    """An objective, and what was measured: in ms, or a share of the operations."""

    objective: str
    measured: float | None
    holds: bool


class Point(BaseModel):
    """One interval of the run, `at` seconds since its start."""

    at: float
    operations: float
    output_tokens: float
    positions: float
    errors: float
    measures: dict[str, dict[str, float]]


class Report(BaseModel):
    """Times in ms, rates a second. `window` is the measured seconds: without the warm-up, until the last reply of a run
    by count. `visits` are those of the whole run, the warm-up's too. `busy` is each worker's share of a core."""

    model_config = ConfigDict(extra="ignore")

    format: int = FORMAT
    keypast: str
    began: datetime
    machine: str
    target: str
    url: str
    scenario: dict[str, Any]
    models: list[str]
    arrival: str
    offered: float | None
    seed: int
    seconds: float
    warmup: float
    window: float
    workers: int
    stopped: bool
    visits: dict[str, int]
    counts: dict[str, int]
    rates: dict[str, float]
    measures: dict[str, dict[str, int | float]]
    errors: dict[str, int]
    error_share: float
    slo: list[Held]
    goodput: float | None
    check: Checked | None
    busy: list[float]
    warnings: list[str]
    curves: dict[str, list[tuple[float, float]]] = {}
    series: list[Point] = []
    memory: dict[str, list[tuple[float, int, int, int]]] = {}

    @classmethod
    def load(cls, path: Path) -> Self:
        """As `report.json` has it. Raises ValueError."""
        try:
            return cls.model_validate_json(path.read_text())
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except ValidationError as error:
            raise ValueError(f"{path} is no report of a load test: {first_error(error)}") from None

    @property
    def holds(self) -> bool:
        return all(each.holds for each in self.slo)

    def line(self) -> str:
        """All but what is for plots, on one line."""
        return self.model_dump_json(exclude={"curves", "series", "memory"})


def report(run: Run) -> Report:
    plan, record = run.plan, run.record
    whole = plan.count is None and not run.stopped
    window = max(1e-9, (plan.seconds if whole else min(plan.seconds, run.elapsed)) - plan.warmup)
    done = record.window
    visits = {name: record.counts[name] for name in ("begun", "ended", "failed", "cut")}
    counts = {name: done[name] for name in ("operations", "requests", "prompt_tokens", "output_tokens", "positions")}
    failed = sum(record.errors.values())
    measured = sum(record.totals[name].get_total_count() for name in record.totals if name in OPERATIONS)
    share = failed / (failed + measured) if failed + measured else 0.0
    names = sorted(record.totals, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    rate = plan.arrival.rate
    told = Report(
        keypast=version("keypast"),
        began=run.began,
        machine=f"{processor()}, {os.cpu_count()} cores",
        target=plan.target,
        url=plan.url,
        scenario=plan.scenario.model_dump(exclude_unset=True),
        models=sorted({model.id for model in plan.models} - {""}),
        arrival=str(plan.arrival),
        offered=None if rate is None else (rate.begin + rate.end) / 2,
        seed=plan.seed,
        seconds=round(run.elapsed, 3),
        warmup=plan.warmup,
        window=round(window, 3),
        workers=plan.workers,
        stopped=run.stopped,
        visits=visits,
        counts=counts,
        rates={"visits": round(done["ended"] / window, 3)} | {k: round(v / window, 3) for k, v in counts.items() if v},
        measures={name: summary(record.totals[name]) for name in names},
        errors=dict(record.errors.most_common()),
        error_share=round(share, 6),
        slo=held(run, share),
        goodput=round(done["good"] / window, 3) if plan.slo.objectives else None,
        check=run.checked,
        busy=run.busy,
        warnings=[],
        curves={name: _curve(record.totals[name]) for name in names},
        series=[_point(at, snapshots, plan.interval) for at, snapshots in sorted(record.series.items())],
        memory=run.memory,
    )
    told.warnings = list(_warnings(told))
    return told


OPERATIONS = ("turn", "prefill", "step", "fork", "request", *PAPERWORK)


def held(run: Run, share: float) -> list[Held]:
    """What was asked for; without an SLO nothing."""
    slo, record = run.plan.slo, run.record
    if not slo.objectives and not slo.errors:
        return []
    found = []
    for each in slo.objectives:
        value = record.ms(each.measure, each.at)
        found.append(Held(objective=str(each), measured=value, holds=value is not None and value <= each.limit))
    return [*found, Held(objective=f"errors <= {100 * slo.errors:g} %", measured=share, holds=share <= slo.errors)]


def _warnings(told: Report) -> Iterable[str]:
    if any(busy > BUSY for busy in told.busy):
        yield "a worker was busy all the time, so the tester may be what was measured: give it more --workers"
    sent = told.measures.get("late", {"count": 0, "p99": 0.0})
    if sent["count"] >= MANY and (late := sent["p99"]) > LATE:
        yield f"requests went out late (p99 {late:g} ms), which counts as latency: more --workers or --connections"
    if not told.counts["operations"]:
        yield "nothing ended in the measured time: a longer --duration, a shorter --warmup"


def _curve(histogram: HdrHistogram) -> list[tuple[float, float]]:
    """(percentile, ms), the last one the maximum."""
    ats = [*CURVE, 100.0]
    return list(zip(ats, Values(histogram).percentiles(ats), strict=True))


def _point(interval: int, snapshots: list[Snapshot], seconds: float) -> Point:
    measures = {}
    for name, encoded in by_name(snapshots).items():
        told = summary(merged(encoded))
        measures[name] = {at: told[at] for at in TOLD}
    rates = {
        name: round(sum(each.counts.get(name, 0) for each in snapshots) / seconds, 3)
        for name in ("operations", "output_tokens", "positions", "errors")
    }
    return Point(at=round(interval * seconds, 3), measures=measures, **rates)


# ---- as it is shown -------------------------------------------------------------------------------------------------


def table(told: Report) -> Table:
    """Latencies, in ms."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=_title(told), title_justify="left", title_style="bold")
    shown.add_column("ms")
    for name in ("count", "mean", *QUANTILES, "max"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, values in told.measures.items():
        cells = (digits(values[each]) for each in ("mean", *QUANTILES, "max"))
        shown.add_row(name, f"{values['count']:,.0f}", *cells, style="dim" if name in ("late", *PAPERWORK) else None)
    return shown


def _title(told: Report) -> str:
    return f"{told.scenario['name']}, {told.arrival}, {told.window:g} s measured, {told.url}"


def lines(told: Report) -> list[tuple[str, str]]:
    """(what, how it was) for under the table."""
    units = {"operations": "operations", "requests": "requests", "output_tokens": "tokens", "positions": "positions"}
    rates = [f"{digits(told.rates[name])} {unit}/s" for name, unit in units.items() if name in told.rates]
    found = [("throughput", ", ".join(rates) or "nothing")]
    visits = told.visits
    ended = f"{visits['begun']} begun, {visits['ended']} ended, {visits['failed']} failed"
    found.append(("visits", ended + (f", {visits['cut']} cut off by the end" if visits["cut"] else "")))
    if told.errors:
        each = ", ".join(f"{name} {number}" for name, number in told.errors.items())
        found.append(("errors", f"{100 * told.error_share:.3g} %: {each}"))
    for held in told.slo:
        value = "nothing" if held.measured is None else digits(held.measured)
        found.append(("slo", f"{'holds ' if held.holds else 'MISSED'}  {held.objective} ({value} measured)"))
    if told.goodput is not None:
        found.append(("goodput", f"{digits(told.goodput)} operations/s within the SLO"))
    if told.check is not None:
        found.append(("check", _checked(told.check)))
    return [*found, *(("warning", each) for each in told.warnings)]


def _checked(check: Checked) -> str:
    text = f"{check.equal} visits equal to the bit"
    if check.close:
        text += f", {check.close} within {check.worst:.2g}"
    if check.different or check.failed:
        text += f", {check.different} DIFFERENT, {check.failed} failed when done again ({check.first})"
    return text


def digits(value: float) -> str:
    """Three significant ones, no exponent."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 3)}f}"


def summary_csv(told: Report) -> str:
    """A line a measure."""
    text = io.StringIO()
    names = ("count", "mean", "min", *QUANTILES, "max")
    rows = csv.writer(text)
    rows.writerow(["measure_ms", *names])
    rows.writerows([measure, *(values[name] for name in names)] for measure, values in told.measures.items())
    return text.getvalue()


def series_csv(told: Report) -> str:
    """A line an interval."""
    text = io.StringIO()
    rates = ("operations", "output_tokens", "positions", "errors")
    measured = [(name, at) for name in told.measures for at in TOLD]
    rows = csv.writer(text)
    rows.writerow(["at_seconds", *(f"{rate}_per_second" for rate in rates), *(f"{n}_{at}_ms" for n, at in measured)])
    for point in told.series:
        values = (point.measures.get(name, {}).get(at, "") for name, at in measured)
        rows.writerow([point.at, *(getattr(point, rate) for rate in rates), *values])
    return text.getvalue()
