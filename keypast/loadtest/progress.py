"""A run as it goes on, on the standard error: a table that renews itself, or a line now and then where none is seen."""

from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from keypast.loadtest.record import PAPERWORK
from keypast.loadtest.report import ORDER, digits
from keypast.loadtest.run import Run

EVERY = 10.0  # seconds between lines


class Progress:
    """A Watch. Used as a context manager around one run or several; `title` is before what is told."""

    def __init__(self, console: Console, title: str = "") -> None:
        self.title = title
        self._console = console
        self._live = Live(console=console, transient=True, refresh_per_second=4) if console.is_terminal else None
        self._told = 0.0  # the last of the periods that was told of

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, run: Run) -> None:
        if self._live is not None:
            self._live.update(Group(self._head(run), table(run), Text(errors(run), style="red")))
        elif (period := max(0.0, run.now) // EVERY) != self._told:
            self._told = period
            self.say(f"{self._title(run)}, {_rate(run)}  {errors(run)}".rstrip())

    def _title(self, run: Run) -> str:
        phase = " (warming up)" if run.now < run.plan.warmup else " (ending)" if run.now > run.plan.seconds else ""
        active = sum(run.active.values())
        return f"{self.title}{max(0.0, run.now):.0f} s{phase}, {active} {'visit runs' if active == 1 else 'visits run'}"

    def _head(self, run: Run) -> Group:
        plan, head = run.plan, Table.grid(padding=(0, 2))
        done, total = max(0.0, run.now), plan.seconds
        if plan.count is not None:
            done, total = run.record.counts["ended"] + run.record.counts["failed"], plan.count
        memory = [f"{name} {points[-1][1]:,} of {points[-1][3]:,}" for name, points in run.memory.items()]
        head.add_row(
            ProgressBar(
                total=total, completed=min(done, total), width=30, complete_style="cyan", finished_style="cyan"
            ),
            self._title(run),
            _rate(run),
        )
        return Group(head, *([Text(f"blocks: {', '.join(memory)}", style="dim")] if memory else []))


def _rate(run: Run) -> str:
    """Of the last whole interval that all workers have told of."""
    told = [number for number, snapshots in run.record.series.items() if len(snapshots) >= run.plan.workers]
    if not told:
        return ""
    last = run.record.series[max(told)]
    names = {"operations": "operations", "output_tokens": "tokens"}
    rates = ((sum(each.counts.get(name, 0) for each in last) / run.plan.interval, unit) for name, unit in names.items())
    return ", ".join(f"{digits(rate)} {unit}/s" for rate, unit in rates if rate)


def table(run: Run) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("ms", min_width=12)
    for name in ("count", "p50", "p99", "max"):
        shown.add_column(name, justify="right", min_width=9)
    for name in sorted(run.record.totals.keys() - {*PAPERWORK, "late"}, key=ORDER.index):
        values = [run.record.ms(name, at) for at in ("p50", "p99", "max")]
        count = f"{run.record.totals[name].get_total_count():,}"
        shown.add_row(name, count, *("" if value is None else digits(value) for value in values))
    return shown


def errors(run: Run) -> str:
    return ", ".join(f"{name} {number}" for name, number in run.record.errors.most_common(4))
