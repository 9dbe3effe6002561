"""What a model holds and has done, in numbers for whoever watches the service. Nothing here decides anything.

The engine adds to a model's Tally under its lock, some tenths of a microsecond a number, whether anybody asks or not.
`Books.figures` gives a copy.

    an append        submitted |-- queued --| first batch ... last batch |   ended: seconds, queued, positions
    a generation     submitted |-- queued --| ... first token | gap | gap |   the same, and its tokens' times
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from engine.batch import Append, Batch, ExportPast, GenerateResult, ImportPast, Work
from engine.events import EventKind
from engine.specs import ModelSpec
from engine.stats import ModelCapacity

OperationName = Literal["prefill", "step", "score", "generate", "export", "import"]
Phase = Literal["step", "prefill", "transfer"]
Drawing = Literal["prefill", "generate"]  # what gives a first token

SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


class Histogram:
    """`counts[i]` values are at most `bounds[i]` and more than the bound before; the last count is of those above all
    bounds. `total` is their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Less than nothing, as a clock that was set back gives it, is nothing."""
        value = max(0.0, value)
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        other = Histogram(self.bounds)
        other.counts, other.total = self.counts.copy(), self.total
        return other


@dataclass(slots=True)
class Ran:
    """Batches of one phase."""

    seconds: Histogram = field(default_factory=Histogram)
    rows: Histogram = field(default_factory=lambda: Histogram(ROWS))

    def copy(self) -> Ran:
        return Ran(self.seconds.copy(), self.rows.copy())


@dataclass(slots=True)
class Done:
    """Operations of one name that ended well. `positions`: computed or moved for them; a generation's prompt is a
    prefill's. `reused`: of the past as each found it, not computed again."""

    seconds: Histogram = field(default_factory=Histogram)
    queued: Histogram = field(default_factory=Histogram)
    positions: int = 0
    reused: int = 0

    def copy(self) -> Done:
        return Done(self.seconds.copy(), self.queued.copy(), self.positions, self.reused)


class Tally:
    """One model's. Times in seconds; the caller holds the engine's lock."""

    def __init__(self) -> None:
        self.ran: dict[Phase, Ran] = {phase: Ran() for phase in get_args(Phase)}
        self.done: dict[OperationName, Done] = {name: Done() for name in get_args(OperationName)}
        self.first_token: dict[Drawing, Histogram] = {name: Histogram() for name in get_args(Drawing)}
        self.token_gap = Histogram()
        self.token_mean = Histogram()  # of the gaps of each generation

    def copy(self) -> Tally:
        other = Tally()
        other.ran = {phase: ran.copy() for phase, ran in self.ran.items()}
        other.done = {name: done.copy() for name, done in self.done.items()}
        other.first_token = {name: times.copy() for name, times in self.first_token.items()}
        other.token_gap, other.token_mean = self.token_gap.copy(), self.token_mean.copy()
        return other

    def batch(self, batch: Batch, seconds: float) -> None:
        ran = self.ran[_phase(batch)]
        ran.seconds.add(seconds)
        ran.rows.add(len(batch.rows))

    def ended(self, operation: Append | ExportPast | ImportPast, work: Work, seconds: float) -> None:
        """It ended well."""
        name = operation_name(operation)
        done = self.done[name]
        done.seconds.add(seconds)
        done.queued.add(work.queue_ms / 1e3)
        done.positions += sum(work.past_length if name == "export" else work.new)
        if name != "export":
            done.reused += sum(work.past_length) - sum(work.replayed)
        if name == "prefill" and work.want.sample is not None:
            self.first_token["prefill"].add(seconds)


class Pace:
    """One generation's times: `began`, its prompt, then each token's commit, then its end if it is a good one."""

    def __init__(self, tally: Tally, began: float) -> None:
        self._tally = tally
        self._began = self._first = self._last = began
        self._commits = 0

    def prompted(self, new: list[int]) -> None:
        """The prompt that it brings, if any; positions a row."""
        self._tally.done["prefill"].positions += sum(new)

    def committed(self, new: list[int], now: float) -> None:
        """`new`: positions a row."""
        if self._commits:
            self._tally.token_gap.add(now - self._last)
        else:
            self._first = now
            self._tally.first_token["generate"].add(now - self._began)
        self._commits += 1
        self._last = now
        self._tally.done["generate"].positions += sum(new)

    def ended(self, result: GenerateResult, now: float) -> None:
        done = self._tally.done["generate"]
        done.seconds.add(now - self._began)
        done.queued.add(result.queue_ms / 1e3)
        done.reused += sum(result.effort.reused)
        if self._commits > 1:
            self._tally.token_mean.add((self._last - self._first) / (self._commits - 1))


@dataclass(frozen=True, slots=True)
class Figures:
    """One model's, at one moment. `sessions` by their state. `running` operations have been in a batch, `waiting` ones
    have not. `events`: how many of each kind there have been."""

    spec: ModelSpec
    capacity: ModelCapacity
    sessions: Mapping[str, int]
    running: int
    waiting: int
    events: Mapping[EventKind, int]
    tally: Tally


def operation_name(operation: Append | ExportPast | ImportPast) -> OperationName:
    if isinstance(operation, Append):
        return "score" if not operation.keep else "step" if operation.step else "prefill"
    return "export" if isinstance(operation, ExportPast) else "import"


def _phase(batch: Batch) -> Phase:
    if batch.rows[0].work.transfer is not None:
        return "transfer"
    for row in batch.rows:
        if row.stop - row.start > 1 or row.queries > 1:
            return "prefill"
    return "step"
