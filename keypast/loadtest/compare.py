"""Two reports side by side: B's figures as multiples of A's."""

from typing import Any

from rich import box
from rich.table import Table

from keypast.loadtest.record import PAPERWORK
from keypast.loadtest.report import ORDER, Report, digits

COMPARED = ("mean", "p50", "p95", "p99", "max")
RATES = ("visits", "operations", "requests", "output_tokens", "positions")
SAME = ("scenario", "arrival", "target", "models", "machine", "warmup", "seed")


def compare(a: Report, b: Report) -> dict[str, Any]:
    """`ratios`: B over A, of what both have. `differs`: what else is not the same about them, as (A's, B's)."""
    ratios: dict[str, dict[str, float]] = {"rates": {}}
    for name in RATES:
        if a.rates.get(name) and name in b.rates:
            ratios["rates"][name] = round(b.rates[name] / a.rates[name], 4)
    if a.goodput and b.goodput is not None:
        ratios["rates"]["goodput"] = round(b.goodput / a.goodput, 4)
    for name in sorted(a.measures.keys() & b.measures.keys(), key=ORDER.index):
        of, to = a.measures[name], b.measures[name]
        ratios[name] = {at: round(to[at] / of[at], 4) for at in COMPARED if of[at]}
    differs = {name: (getattr(a, name), getattr(b, name)) for name in SAME if getattr(a, name) != getattr(b, name)}
    shares = (a.error_share, b.error_share)
    return {"ratios": ratios, "differs": differs, "error_share": shares, "a": a.url, "b": b.url}


def table(a: Report, b: Report) -> Table:
    """Rates, then the latencies that users wait for; a ratio is B over A."""
    found = compare(a, b)["ratios"]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("")
    for name in ("", "A", "B", "B/A"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, ratio in found.pop("rates").items():
        sides = (a.goodput or 0, b.goodput or 0) if name == "goodput" else (a.rates[name], b.rates[name])
        shown.add_row(name.replace("_", " "), "a second", digits(sides[0]), digits(sides[1]), _ratio(ratio, more=True))
    for name, ratios in found.items():
        if name in (*PAPERWORK, "late"):
            continue
        shown.add_section()
        for at, ratio in ratios.items():
            first = name if at == next(iter(ratios)) else ""
            values = digits(a.measures[name][at]), digits(b.measures[name][at])
            shown.add_row(first, f"{at}, ms", *values, _ratio(ratio, more=False))
    return shown


def _ratio(ratio: float, *, more: bool) -> str:
    """Coloured where it is 5 % better or worse."""
    text = f"{ratio:.2f}"
    if 0.95 <= ratio <= 1.05:
        return text
    return f"[green]{text}[/]" if (ratio > 1) == more else f"[red]{text}[/]"
