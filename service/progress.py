"""How far loading is, as an operator sees it: a live line on a terminal, else a line for each thing that is begun."""

import re
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

_COUNT = re.compile(r" (\d+)/(\d+)\b")


class Display:
    """A context manager. Called with what goes on, as often as one likes: `starting torch`, `loading m 3/272 tensors`.
    Before a count stands what is done; the count is a bar's."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = ""
        self._live = Progress(
            SpinnerColumn(),
            BarColumn(20, complete_style="cyan", finished_style="cyan", pulse_style="cyan"),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._live.add_task("", total=None)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def refresh(self) -> None:
        """Draws what was told now, and not when its turn comes."""
        self._live.refresh()

    def __call__(self, message: str) -> None:
        count = _COUNT.search(message)
        begun = message if count is None else message[: count.start()]
        if begun != self._begun:
            self._begun = begun
            if self._console.is_terminal:
                self._live.reset(self._task, total=None)
            else:
                self._console.print(begun, markup=False)
        done, total = (None, None) if count is None else (int(count[1]), int(count[2]))
        self._live.update(self._task, description=message, completed=done, total=total)
