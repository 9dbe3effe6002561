"""Plots as PNGs, by matplotlib where it is installed."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from keypast.loadtest.plots import Plot
from keypast.loadtest.svg import LAST, Axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Canvas

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


def _draw(plot: Plot, axes: "Canvas") -> None:
    for line, colour in zip(plot.lines, COLOURS, strict=False):
        x = [_nines(at) if plot.x == "percentile" else at for at, _ in line.points]
        y = [value for _, value in line.points]
        axes.plot(x, y, color=colour, label=line.label, linewidth=1.6)
        if line.filled:
            axes.fill_between(x, y, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(f"{plot.title}, {plot.y}", loc="left", fontsize=11, fontweight="bold")
    scale = Axes(plot)
    if plot.log:
        axes.set_yscale("log")
    axes.set_ylim(scale.low, scale.high)
    axes.set_yticks(*zip(*scale.ticks_y(), strict=True))
    axes.set_yticks([], minor=True)
    ticks = [(_nines(at) if plot.x == "percentile" else at, label) for at, label in scale.ticks_x()]
    axes.set_xticks(*zip(*ticks, strict=True))
    if plot.warmup:
        axes.axvspan(0, plot.warmup, color="0.93", linewidth=0)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, labelsize=9)
    axes.margins(x=0.01)
    if len(plot.lines) > 1:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


def _nines(percentile: float) -> float:
    """Every nine has the same room."""
    return -math.log10(1 - min(percentile, LAST) / 100)
