"""A few shapes as SVG. Each picture has a ground of its own, light or dark as the reader's system is."""

from dataclasses import dataclass, field
from xml.sax.saxutils import escape

# class: colour by day, colour by night
COLOURS = {
    "ground": ("#ffffff", "#15181d"),
    "room": ("#f3f5f8", "#1d222a"),
    "box": ("#ffffff", "#2a313c"),
    "shared": ("#cfe3fb", "#1f4a7a"),
    "own": ("#d3efd9", "#1f5a36"),
    "copied": ("#fde3c0", "#7a4b12"),
    "line": ("#8792a2", "#7d8896"),
    "text": ("#1c2430", "#e8ecf2"),
    "faint": ("#596575", "#a4afbd"),
}
_FILLED = ("ground", "room", "box", "shared", "own", "copied")  # the rest are lines and words
_FONT = "font-family: system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def style(night: bool) -> str:
    """The rules of one of the two colour schemes."""
    rules = []
    for name, pair in COLOURS.items():
        colour = pair[night]
        if name in _FILLED:
            edge = f"; stroke: {COLOURS['line'][night]}" if name == "box" else ""
            rules.append(f".{name} {{ fill: {colour}{edge} }}")
        elif name == "line":
            rules.append(f".line {{ stroke: {colour}; stroke-width: 1.4; fill: none }} .tip {{ fill: {colour} }}")
        else:
            rules.append(f".{name} {{ fill: {colour} }}")
    return "\n".join(rules)


@dataclass
class Drawing:
    """Shapes in the order in which they are drawn. Lengths are in pixels, (0, 0) is the left upper corner."""

    width: int
    height: int
    title: str
    shapes: list[str] = field(default_factory=list)

    def box(self, kind: str, x: float, y: float, width: float, height: float, radius: float = 6) -> None:
        self.shapes.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'
        )

    def text(
        self,
        words: str,
        x: float,
        y: float,
        *,
        size: int = 13,
        kind: str = "text",
        at: str = "middle",
        bold: bool = False,
    ) -> None:
        """`y` is the middle of the line; `at`: start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(
            f'<text class="{kind}" x="{x:g}" y="{y + size * 0.36:g}" font-size="{size}" '
            f'text-anchor="{at}"{weight}>{escape(words)}</text>'
        )

    def labelled(self, kind: str, words: str, x: float, y: float, width: float, height: float) -> None:
        """A box with its words in the middle; `|` begins a new, fainter line."""
        self.box(kind, x, y, width, height)
        first, *rest = words.split("|")
        top = y + height / 2 - 8 * len(rest)
        self.text(first, x + width / 2, top, bold=bool(rest))
        for line, faint in enumerate(rest, 1):
            self.text(faint, x + width / 2, top + 16 * line, size=11, kind="faint")

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, both: bool = False) -> None:
        ends = ' marker-end="url(#tip)"' + ' marker-start="url(#tip)"' * both
        self.shapes.append(f'<path class="line" d="M{x1:g} {y1:g} L{x2:g} {y2:g}"{ends}/>')

    def svg(self) -> str:
        tip = (
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path class="tip" d="M0 0.5 L8 4 L0 7.5 z"/></marker>'
        )
        ground = f'<rect class="ground" width="{self.width}" height="{self.height}" rx="10"/>'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">'
        )
        rules = f"text {{ {_FONT} }}\n{style(False)}\n@media (prefers-color-scheme: dark) {{\n{style(True)}\n}}"
        parts = [head, f"<title>{escape(self.title)}</title>", f"<style>\n{rules}\n</style>", f"<defs>{tip}</defs>"]
        return "\n".join([*parts, ground, *self.shapes, "</svg>", ""])
