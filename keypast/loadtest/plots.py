"""What is drawn of a report, as data: `svg` and `png` know how."""

import re
from dataclasses import dataclass
from typing import Literal

from keypast.loadtest.report import Report

SHOWN = ("turn", "ttft", "inter_token", "prefill", "step", "fork", "request", "queue", "compute")
MAIN = ("turn", "step", "request", "prefill", "fork")  # whose percentiles over time are drawn: the first that there is
TITLES = {"ttft": "Time to first token", "inter_token": "Time between tokens"}
RATES = {"operations": "Operations", "output_tokens": "Tokens", "positions": "Positions", "errors": "Errors"}
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """`filled` down to the axis."""

    label: str
    points: Points
    filled: bool = False


@dataclass(frozen=True)
class Plot:
    """`x`: seconds, or a percentile, drawn so that every nine has the same room. `y` is its unit; `log`: that axis is
    logarithmic. `warmup`: seconds that were not measured."""

    name: str
    title: str
    y: str
    lines: list[Line]
    x: Literal["seconds", "percentile"] = "seconds"
    log: bool = False
    warmup: float = 0.0


def plots(told: Report) -> list[Plot]:
    """Those that have something to show."""
    found = [_curves(told), *_over_time(told), *_throughput(told), *_memory(told)]
    return [plot for plot in found if any(len(line.points) > 1 for line in plot.lines)]


def _curves(told: Report) -> Plot:
    lines = [Line(name.replace("_", " "), told.curves[name]) for name in SHOWN if name in told.curves]
    return Plot("latency", "Latency by percentile", "ms", lines, "percentile", log=True)


def _over_time(told: Report) -> list[Plot]:
    found = []
    for name in [*[name for name in MAIN if name in told.measures][:1], "ttft", "inter_token"]:
        lines = [
            Line(at, [(point.at, point.measures[name][at]) for point in told.series if name in point.measures])
            for at in ("p50", "p95", "p99")
        ]
        title = TITLES.get(name, name.capitalize())
        found.append(Plot(f"{name}_over_time", title, "ms", lines, log=True, warmup=told.warmup))
    return found


def _throughput(told: Report) -> list[Plot]:
    found = []
    inside = [point for point in told.series if point.at <= told.warmup + told.window]
    for name, title in RATES.items():
        points = [(point.at, float(getattr(point, name))) for point in inside]
        if any(value for _, value in points):
            lines = [Line(name, points, filled=True)]
            found.append(Plot(f"{name}_over_time", title, "1/s", lines, warmup=told.warmup))
    return found


def _memory(told: Report) -> list[Plot]:
    """Blocks in use."""
    found = []
    for model, points in told.memory.items():
        if any(used for _, used, _, _ in points):
            lines = [
                Line("used", [(at, float(used)) for at, used, _, _ in points], True),
                Line("shared", [(at, float(shared)) for at, _, shared, _ in points]),
            ]
            name = re.sub(r"[^A-Za-z0-9._-]", "_", model)  # it becomes a file's
            unit = f"KV blocks, of {points[-1][3]:,}"
            found.append(Plot(f"memory_{name}", f"Memory of {model}", unit, lines, warmup=told.warmup))
    return found
