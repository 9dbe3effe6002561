"""A report as one HTML file that needs nothing else: no script, no font, no address."""

import json
from html import escape

from keypast.loadtest.plots import plots
from keypast.loadtest.record import PAPERWORK, QUANTILES
from keypast.loadtest.report import Report, digits, lines
from keypast.loadtest.svg import svg

STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --faint: #66717e; --line: #e2e6ea; --page: #fff; --card: #f7f8fa;
  --bad: #b3261e; --good: #1e7d4a; --c0: #2563ae; --c1: #d9730d; --c2: #b3261e; --c3: #1e7d4a; --c4: #7a4fb5;
  --c5: #8a5a3c; --c6: #c2418f; --c7: #6b7480; --c8: #1a8a93; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --faint: #98a3af; --line: #323a43; --page: #14181d;
  --card: #1c2228; --bad: #ff8a80; --good: #6fd39b; --c0: #74aaf2; --c1: #f2a65a; --c2: #ff8a80; --c3: #6fd39b;
  --c4: #b99af0; --c5: #d0a487; --c6: #f08cc6; --c7: #a7b0ba; --c8: #62cdd6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 28px 24px 48px; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 15px; margin: 32px 0 8px; }
p.about { color: var(--faint); margin: 2px 0 20px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px;
  min-width: 130px; }
.tile b { display: block; font-size: 20px; font-weight: 600; } .tile span { color: var(--faint); font-size: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
tr.dim td { color: var(--faint); } td.text { text-align: left; white-space: normal; }
.scroll { overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); gap: 14px; }
.plots > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
svg { display: block; width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
svg text.title { font-size: 13px; font-weight: 600; fill: var(--ink); } svg .grid { stroke: var(--line); }
svg .warmup { fill: var(--faint); fill-opacity: 0.1; }
.MISSED { color: var(--bad); font-weight: 600; } .warning { color: var(--bad); } .holds { color: var(--good); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto; }
"""


def html(told: Report) -> str:
    name = escape(told.scenario["name"])
    models = f", {', '.join(map(escape, told.models))}" if told.models else ""
    about = (
        f"{escape(told.arrival)}, {told.window:g} s measured after {told.warmup:g} s of warm-up, seed {told.seed}<br>"
        f"{escape(told.url)} ({told.target}){models}<br>"
        f"{told.began:%Y-%m-%d %H:%M} UTC, keypast {escape(told.keypast)}, tester on {escape(told.machine)}"
    )
    drawn = "\n".join(f"<div>{svg(plot)}</div>" for plot in plots(told))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{name}: load test</title><style>{STYLE}</style></head><body>
<h1>Load test: {name}</h1><p class="about">{about}</p>
<div class="tiles">{_tiles(told)}</div>
<h2>Latency, ms</h2><div class="scroll">{_table(told)}</div>
<h2>Result</h2><table>{_lines(told)}</table>
<h2>Plots</h2><div class="plots">{drawn}</div>
<h2>Scenario</h2><pre>{escape(_scenario(told))}</pre>
</body></html>
"""


def _tiles(told: Report) -> str:
    found = [(digits(told.rates.get("operations", 0.0)), "operations a second")]
    if "output_tokens" in told.rates:
        found.append((digits(told.rates["output_tokens"]), "tokens a second"))
    if told.goodput is not None:
        found.append((digits(told.goodput), "within the SLO, a second"))
    names = [name for name in ("ttft", "inter_token", "turn", "step", "request") if name in told.measures]
    found += [(f"{digits(told.measures[name]['p99'])} ms", f"{name.replace('_', ' ')}, p99") for name in names]
    found.append((f"{100 * told.error_share:.3g} %", "errors"))
    return "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in found)


def _table(told: Report) -> str:
    names = ("mean", "min", *QUANTILES, "max")
    head = "".join(f"<th>{name}</th>" for name in ("", "count", *names))
    rows = []
    for measure, values in told.measures.items():
        cells = "".join(f"<td>{digits(values[name])}</td>" for name in names)
        dim = ' class="dim"' if measure in ("late", *PAPERWORK) else ""
        rows.append(f"<tr{dim}><td>{measure.replace('_', ' ')}</td><td>{values['count']:,.0f}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _lines(told: Report) -> str:
    rows = []
    for what, how in lines(told):
        mark = "MISSED" if "MISSED" in how or "DIFFERENT" in how else "holds" if how.startswith("holds") else what
        rows.append(f'<tr><td>{what}</td><td class="text {mark}">{escape(how)}</td></tr>')
    return "".join(rows)


def _scenario(told: Report) -> str:
    return json.dumps(told.scenario, indent=2)
