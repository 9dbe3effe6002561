"""Plots as PNGs, by matplotlib where it is installed."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from keypast.loadtest.plots import Plot
from keypast.loadtest.svg import LAST, NINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#2563ae", "#d9730d", "#b3261e", "#1e7d4a", "#7a4fb5", "#8a5a3c", "#c2418f", "#6b7480", "#1a8a93")


def save(plots: list[Plot], folder: Path) -> list[Path]:
    """One file a plot. Raises ModuleNotFoundError: matplotlib is not installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = []
    for plot in plots:
        figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        _draw(plot, figure.add_subplot())
        path = folder / f"{plot.name}.png"
        figure.savefig(path)
        found.append(path)
    return found


def _draw(plot: Plot, axes: "Axes") -> None:
    for line, colour in zip(plot.lines, COLOURS, strict=False):
        x = [_nines(at) if plot.x == "percentile" else at for at, _ in line.points]
        y = [value for _, value in line.points]
        axes.plot(x, y, color=colour, label=line.label, linewidth=1.6)
        if line.filled:
            axes.fill_between(x, y, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(plot.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(plot.y)
    if plot.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=0)
    if plot.x == "percentile":
        axes.set_xticks([_nines(at) for at in NINES], [f"p{at:g}" if at else "min" for at in NINES])
    else:
        axes.set_xlabel("seconds")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(plot.lines) > 1:
        axes.legend(frameon=False, fontsize=9, ncols=2)


def _nines(percentile: float) -> float:
    """Every nine has the same room."""
    return -math.log10(1 - min(percentile, LAST) / 100)
