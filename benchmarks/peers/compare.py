"""Two sides measured in turn, and what is said of them: medians, the ratio of every pair, one JSON line at the end."""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keypast._machine import processor

RESULTS = Path(__file__).parent.parent / "results"


@dataclass
class Pairs:
    """One question; `better`: more or less of `unit`. `goal` of the median ratio, above 1 where ours is better."""

    what: str
    peer: str
    unit: str
    better: str = "more"
    goal: float | None = None
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def add(self, ours: float, theirs: float) -> None:
        self.ours.append(ours)
        self.theirs.append(theirs)

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.ours, self.theirs, strict=True)
        return [a / b if self.better == "more" else b / a for a, b in pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def row(self) -> str:
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        spread = f"{min(self.ratios):.2f}-{max(self.ratios):.2f}"
        goal = "" if self.goal is None else f"{self.goal:g} {'met' if self.ratio >= self.goal else 'MISSED'}"
        return f"{self.what:46} {self.peer:22} {ours:10.4g} {theirs:10.4g}" + (
            f" {self.unit:8} {self.ratio:6.2f}  {spread:12} {goal}"
        )


HEADER = f"{'what':46} {'peer':22} {'ours':>10} {'theirs':>10} {'unit':8} {'ratio':>6}  {'range':12} goal"


def interleave(pairs: Pairs, ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> Pairs:
    """Measures both sides in every round, the order turned each time."""
    for index in range(rounds):
        if index % 2:
            second = theirs()
            pairs.add(ours(), second)
        else:
            pairs.add(ours(), theirs())
    print(pairs.row(), flush=True)
    return pairs


def median_ms(run: Callable[[], object], repeats: int = 20) -> float:
    """Median ms of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def report(benchmark: str, results: list[Pairs], versions: dict[str, str], save: bool) -> None:
    """`conclude` with what was compared."""
    told = [{**asdict(pairs), "ratio": round(pairs.ratio, 3)} for pairs in results]
    conclude(benchmark, versions, {"results": told}, save)


def conclude(benchmark: str, versions: dict[str, str], told: dict[str, Any], save: bool) -> None:
    """The last line, and with `save` the same under benchmarks/results."""
    summary = {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": {"torch": version("torch"), **versions},
        **told,
    }
    line = json.dumps(summary)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{summary['date']}-{benchmark}.json").write_text(line + "\n")
    print(line)
