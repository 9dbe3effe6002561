"""Samples to histograms, counters and intervals.

A worker's `Recorder` fills histograms for one interval and hands them over; the parent's `Record` adds up what the
workers sent. A histogram is HDR: microseconds, three digits, up to an hour.

Two windows, which are the same seconds: latencies and errors are of what was *due* in it, however long it took, so that
what a slow server leaves behind is not forgotten; throughput is of what *ended* in it, so that it is not flattered.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram
from pydantic import BaseModel

from keypast.loadtest.slo import Slo

HIGHEST = 3_600_000_000  # µs
QUANTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}
PAPERWORK = ("create", "delete")  # operations that no user waits for by themselves


@dataclass(slots=True)
class Sample:
    """One operation; times are instants in seconds. `tokens` are the arrivals of a stream's; the service's own times
    are in ms, None where it does not tell them."""

    operation: str
    due: float
    sent: float | None = None
    ended: float = 0.0
    tokens: list[float] = field(default_factory=list)
    queue_ms: float | None = None
    compute_ms: float | None = None
    error: str | None = None


class Snapshot(BaseModel):
    """What a worker has recorded since the last one. `measures` are encoded histograms by name; `counts` are of the
    interval, `window` of the measured seconds."""

    interval: int
    measures: dict[str, str]
    counts: dict[str, int]
    window: dict[str, int]
    errors: dict[str, int]
    active: int = 0


def new_histogram() -> HdrHistogram:
    return HdrHistogram(1, HIGHEST, 3)


def put(histogram: HdrHistogram, seconds: float) -> None:
    histogram.record_value(min(HIGHEST, max(1, round(seconds * 1e6))))


class Recorder:
    """`start` is the run's; the window is in seconds from there."""

    def __init__(self, start: float, window: tuple[float, float], interval: float, slo: Slo) -> None:
        self.active = 0
        self._window = (start + window[0], start + window[1])
        self._start = start
        self._interval = interval
        self._slo = slo
        self._histograms: dict[str, HdrHistogram] = {}
        self._counts: Counter[str] = Counter()
        self._inside: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    def tick(self, what: str, number: int, at: float) -> None:
        self._counts[what] += number
        if self._in_window(at):
            self._inside[what] += number

    def add(self, sample: Sample) -> None:
        """`sample.ended` is set; without `sent` it never came to be sent, and has failed."""
        measured = self._in_window(sample.due)
        if sample.error is not None:
            self.tick("errors", 1, sample.due)
            if measured:
                self._errors[f"{sample.operation} {sample.error}"] += 1
            return
        work = sample.operation not in PAPERWORK
        if work:
            self.tick("operations", 1, sample.ended)
        if not measured:
            return
        values = self._values(sample)
        for name, seconds in values.items():
            put(self._histogram(name), seconds)
        gaps = [after - before for before, after in pairwise(sample.tokens)]
        for gap in gaps:
            put(self._histogram("inter_token"), gap)
        if gaps:
            values["inter_token"] = sum(gaps) / len(gaps)
        if work and self._slo.within({name: 1e3 * seconds for name, seconds in values.items()}):
            self._inside["good"] += 1

    def take(self, now: float) -> Snapshot:
        measures = {name: each for name, each in self._histograms.items() if each.get_total_count()}
        snapshot = Snapshot(
            interval=int((now - self._start) / self._interval),
            measures={name: each.encode().decode() for name, each in measures.items()},
            counts=dict(self._counts),
            window=dict(self._inside),
            errors=dict(self._errors),
            active=self.active,
        )
        for histogram in measures.values():
            histogram.reset()
        for counter in (self._counts, self._inside, self._errors):
            counter.clear()
        return snapshot

    def _in_window(self, at: float) -> bool:
        return self._window[0] <= at < self._window[1]

    def _histogram(self, name: str) -> HdrHistogram:
        if name not in self._histograms:
            self._histograms[name] = new_histogram()
        return self._histograms[name]

    def _values(self, sample: Sample) -> dict[str, float]:
        """Seconds."""
        values = {sample.operation: sample.ended - sample.due}
        if sample.sent is not None:
            values["late"] = sample.sent - sample.due
        if sample.tokens:
            values["ttft"] = sample.tokens[0] - sample.due
        if sample.queue_ms is not None and sample.compute_ms is not None:
            values["queue"] = sample.queue_ms / 1e3
            values["compute"] = sample.compute_ms / 1e3
        return values


class Record:
    """All workers' snapshots. `series` keeps those of each interval encoded: a histogram takes 180 KiB."""

    def __init__(self) -> None:
        self.totals: dict[str, HdrHistogram] = {}
        self.counts: Counter[str] = Counter()  # of all of it
        self.window: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.series: dict[int, list[Snapshot]] = {}

    def add(self, snapshot: Snapshot) -> None:
        for name, encoded in snapshot.measures.items():
            self.totals.setdefault(name, new_histogram()).decode_and_add(encoded)
        self.counts.update(snapshot.counts)
        self.window.update(snapshot.window)
        self.errors.update(snapshot.errors)
        self.series.setdefault(snapshot.interval, []).append(snapshot)

    def ms(self, name: str, at: str) -> float | None:
        """A percentile (`p99`), mean or max; None: nothing was measured."""
        histogram = self.totals.get(name)
        return None if histogram is None or not histogram.get_total_count() else value_ms(histogram, at)


def value_ms(histogram: HdrHistogram, at: str) -> float:
    values = Values(histogram)
    if at == "mean":
        return values.mean
    return values.percentiles([100.0 if at == "max" else float(at[1:])])[0]


def summary(histogram: HdrHistogram) -> dict[str, int | float]:
    """count, and mean, min, p50 to p99.9, max in ms; not of an empty one."""
    values = Values(histogram)
    least, *found, most = values.percentiles([0.0, *QUANTILES.values(), 100.0])
    told: dict[str, int | float] = {"count": values.count, "mean": values.mean, "min": least}
    return told | dict(zip(QUANTILES, found, strict=True)) | {"max": most}


class Values:
    """What a histogram holds, ordered: the library looks for each percentile anew, in Python."""

    def __init__(self, histogram: HdrHistogram) -> None:
        counts = np.frombuffer(histogram.counts, np.int64)
        (places,) = counts.nonzero()
        self._ms = _bucket_ms()[places]
        self._upto = counts[places].cumsum()
        self.count = int(self._upto[-1])
        self.mean = round(float((self._ms * counts[places]).sum() / self.count), 3)

    def percentiles(self, at: Sequence[float]) -> list[float]:
        """ms, each of the smallest value that so many percent do not pass."""
        wanted = np.ceil(np.asarray(at) / 100 * self.count - 1e-6).clip(1)
        found: list[float] = self._ms[np.searchsorted(self._upto, wanted)].round(3).tolist()
        return found


@cache
def _bucket_ms() -> npt.NDArray[np.float64]:
    """The middle of what each of a histogram's counters counts."""
    histogram = new_histogram()
    lows = [histogram.get_value_from_index(at) for at in range(histogram.counts_len)]
    highs = [histogram.get_highest_equivalent_value(low) for low in lows]
    return np.array([(low + high) / 2e3 for low, high in zip(lows, highs, strict=True)])


def merged(encoded: Iterable[str]) -> HdrHistogram:
    total = new_histogram()
    for each in encoded:
        total.decode_and_add(each)
    return total


def by_name(snapshots: Iterable[Snapshot]) -> Mapping[str, list[str]]:
    """The encoded histograms of each measure."""
    found: dict[str, list[str]] = {}
    for snapshot in snapshots:
        for name, encoded in snapshot.measures.items():
            found.setdefault(name, []).append(encoded)
    return found
