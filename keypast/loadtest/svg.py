"""A plot as inline SVG. Colours come from the page's style: `--c0` and so on, `--ink`, `--faint`."""

import math
from collections.abc import Iterable
from html import escape

from keypast.loadtest.plots import Line, Plot

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, BOTTOM = 46, 14, 30
TOP, LEGEND = 30, 22  # LEGEND: more, where it has a row of its own
BESIDE = 4  # lines whose names fit beside the title
COLOURS = 9
NINES = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99)
LEAST = 1e-9  # what is less cannot be divided by, and is nothing
LAST = 99.99  # percentile at the right end; the maximum is drawn there


def svg(plot: Plot) -> str:
    axes = Axes(plot)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.title)}">',
        f'<text class="title" x="{LEFT}" y="16">{escape(plot.title)}, {escape(plot.y)}</text>',
        *_grid(plot, axes),
        *(part for at, line in enumerate(plot.lines) for part in _line(line, at, axes)),
        *_legend(plot),
        "</svg>",
    ]
    return "\n".join(parts)


class Axes:
    """From values to places."""

    def __init__(self, plot: Plot) -> None:
        points = [point for line in plot.lines for point in line.points]
        self._plot = plot
        self.top = TOP + (LEGEND if len(plot.lines) > BESIDE else 0)
        self._end = _end(x for x, _ in points)
        high = _end(y for _, y in points)
        positive = [y for _, y in points if y > 0]
        self.low = min(positive, default=high) if plot.log else 0.0
        if plot.log:
            self.low = 10 ** math.floor(math.log10(max(1e-3, self.low)))
            self.high = max(self.low * 10, _round_up_log(high))
        else:
            self.high = _round_up(high)

    def x(self, value: float) -> float:
        if self._plot.x == "seconds":
            share = value / self._end
        else:
            share = math.log10(1 - min(value, LAST) / 100) / math.log10(1 - LAST / 100)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        if self._plot.log:
            share = math.log10(max(value, self.low) / self.low) / math.log10(self.high / self.low)
        else:
            share = value / self.high
        return HEIGHT - BOTTOM - share * (HEIGHT - self.top - BOTTOM)

    def ticks_x(self) -> list[tuple[float, str]]:
        if self._plot.x == "percentile":
            return [(at, f"p{at:g}" if at else "min") for at in NINES]
        step = _round_up(self._end / 6)
        return [(step * at, f"{step * at:g} s") for at in range(int(self._end / step + 1e-9) + 1)]

    def ticks_y(self) -> list[tuple[float, str]]:
        if not self._plot.log:
            parts = 5 if f"{self.high:.1e}"[:3] in ("1.0", "2.5", "5.0") else 4  # so that each is a round number
            return [(self.high * at / parts, _short(self.high * at / parts)) for at in range(parts + 1)]
        powers = range(round(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1,) if self.high / self.low > 1e3 else (1, 2, 5)
        values = (digit * 10.0**power for power in powers for digit in digits)
        return [(value, _short(value)) for value in values if self.low <= value <= self.high * 1.001]


def _grid(plot: Plot, axes: Axes) -> list[str]:
    parts = []
    if plot.warmup:
        width = axes.x(plot.warmup) - LEFT
        place = f'x="{LEFT}" y="{axes.top}" width="{width:.1f}" height="{HEIGHT - BOTTOM - axes.top}"'
        parts.append(f'<rect class="warmup" {place}><title>warm-up</title></rect>')
    for value, label in axes.ticks_y():
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    ticks = axes.ticks_x()
    for value, label in ticks:
        x = axes.x(value)
        anchor = "end" if x > WIDTH - RIGHT - 20 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{anchor}">{label}</text>')
    return parts


def _line(line: Line, at: int, axes: Axes) -> list[str]:
    if not line.points:
        return []
    places = [f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line.points]
    colour = f"var(--c{at % COLOURS})"
    parts = []
    if line.filled:
        floor = HEIGHT - BOTTOM
        ends = f"{axes.x(line.points[0][0]):.1f},{floor} {' '.join(places)} {axes.x(line.points[-1][0]):.1f},{floor}"
        parts.append(f'<polygon points="{ends}" fill="{colour}" fill-opacity="0.15"/>')
    parts.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    return parts


def _legend(plot: Plot) -> list[str]:
    """At the right of the title, or below it; one line needs none."""
    if len(plot.lines) < 2:
        return []
    widths = [6.4 * len(line.label) + 28 for line in plot.lines]
    y = 16.0 if len(plot.lines) <= BESIDE else 16.0 + LEGEND
    x = float(LEFT) if y > 16 else WIDTH - RIGHT - sum(widths) + 12
    parts = []
    for at, (line, width) in enumerate(zip(plot.lines, widths, strict=True)):
        parts.append(f'<rect x="{x:.1f}" y="{y - 8}" width="9" height="9" rx="2" fill="var(--c{at % COLOURS})"/>')
        parts.append(f'<text x="{x + 13:.1f}" y="{y}">{escape(line.label)}</text>')
        x += width
    return parts


def _end(values: Iterable[float]) -> float:
    """Of an axis that is to show them all."""
    largest = max(values, default=0.0)
    return largest if largest >= LEAST else 1.0


def _round_up(value: float) -> float:
    """To 1, 2, 2.5, 4, 5, 6 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 2.5, 4, 5, 6, 8) if step * power >= value * (1 - 1e-9)), 10 * power)


def _round_up_log(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(max(value, 1e-3)))
    return next((step * power for step in (1, 2, 5) if step * power >= value), 10 * power)


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.3g}"
