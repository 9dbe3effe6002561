"""Reports: what they say is what was recorded; every form of one can be read again."""

import csv
import io
import json
import re
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from keypast.loadtest import compare, png
from keypast.loadtest.check import Checked
from keypast.loadtest.check import compare as compare_outputs
from keypast.loadtest.html import html
from keypast.loadtest.plots import Line, Plot, plots
from keypast.loadtest.record import Recorder, Sample, Snapshot, new_histogram, put, summary
from keypast.loadtest.report import Report, digits, lines, report, series_csv, summary_csv, table
from keypast.loadtest.run import Run
from keypast.loadtest.slo import Slo
from keypast.loadtest.svg import svg
from tests.loadtest.loads import plan


def a_run(slower: float = 1.0, **settings: Any) -> Run:
    """Ten seconds of turns of 100, 200 .. 1,000 ms; the last one fails."""
    slo = Slo.parse(["turn.p50=501ms", "ttft=20ms", "errors=1%"]).model_dump()
    asked = plan("http://host", seconds=12, warmup=2, interval=1.0, slo=slo, **settings)
    run = Run(asked, datetime(2026, 1, 1, tzinfo=UTC), 0.0, elapsed=12.0, busy=[0.5])
    recorder = Recorder(0.0, (2.0, 12.0), 1.0, asked.slo)
    for second in range(12):
        due, took = float(second), 0.1 * slower * max(1, second - 1)
        tokens = [due + 0.01 * slower, due + 0.02, due + 0.04]
        error = "queue_full" if second == 11 else None
        for at in tokens:
            recorder.tick("output_tokens", 1, at)
        recorder.add(Sample("turn", due, due, due + took, tokens, 1.0, 2.0, error))
        run.record.add(recorder.take(second + 0.999))
    run.memory = {"org/m": [(0.0, 1, 0, 64), (5.0, 40, 8, 64)]}
    return run


def test_what_was_recorded_is_told() -> None:
    told = report(a_run())
    assert (told.window, told.counts["operations"], told.counts["output_tokens"]) == (10, 9, 30)
    turn = told.measures["turn"]
    assert (turn["count"], told.measures["inter_token"]["count"]) == (9, 18)
    assert turn["p50"] == pytest.approx(500, rel=1e-3)
    assert turn["max"] == pytest.approx(900, rel=1e-3)
    assert turn["mean"] == pytest.approx(500, rel=1e-3)
    assert (told.errors, told.error_share) == ({"turn queue_full": 1}, 0.1)
    assert [(each.objective, each.holds) for each in told.slo] == [
        ("turn.p50 <= 501 ms", True),
        ("ttft.p99 <= 20 ms", True),
        ("errors <= 1 %", False),
    ]
    assert not told.holds
    assert told.goodput == 0.5  # 100 to 500 ms
    assert [point.at for point in told.series] == list(range(12))
    assert told.series[3].measures["turn"]["p99"] == pytest.approx(200, rel=1e-3)


def test_a_report_is_read_again(tmp_path: Path) -> None:
    told = report(a_run())
    path = tmp_path / "report.json"
    path.write_text(told.model_dump_json())
    assert Report.load(path) == told
    line = json.loads(told.line())
    assert "series" not in line
    assert line["measures"]["turn"]["p99"] == told.measures["turn"]["p99"]
    path.write_text('{"format": 1}')
    with pytest.raises(ValueError, match="is no report of a load test: keypast: Field required"):
        Report.load(path)
    with pytest.raises(ValueError, match="No such file"):
        Report.load(tmp_path / "none.json")


def test_tables_for_other_programs() -> None:
    told = report(a_run())
    rows = list(csv.DictReader(io.StringIO(summary_csv(told))))
    assert {row["measure_ms"]: float(row["p99"]) for row in rows} == {n: v["p99"] for n, v in told.measures.items()}
    points = list(csv.DictReader(io.StringIO(series_csv(told))))
    assert [float(point["output_tokens_per_second"]) for point in points] == [3] * 12
    assert points[0]["turn_p99_ms"] == ""  # the warm-up is not measured
    assert float(points[4]["turn_p50_ms"]) == pytest.approx(300, rel=1e-3)


def test_what_a_person_sees() -> None:
    told = report(a_run())
    told.check = Checked(equal=3, different=1, first="visit 7: output 0 was a, alone it is b")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(told))
    text = console.export_text()
    assert re.search(r"turn +9 +500 +500 +90\d +90\d +90\d +90\d +90\d", text)
    said = dict(lines(told))
    assert said["throughput"] == "0.900 operations/s, 3.00 tokens/s"
    assert said["errors"] == "10 %: turn queue_full 1"
    assert said["check"].endswith("1 DIFFERENT, 0 failed when done again (visit 7: output 0 was a, alone it is b)")


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    told = report(a_run(scenario={"name": "<b>&", "visits": [{"kind": "request", "body": "</pre><script>"}]}))
    page = html(told)
    assert "<script" not in page
    assert "<b>&:" not in page
    assert not re.search(r"(src|href|url)\s*[=(]", page)
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    titles = [ElementTree.fromstring(each).attrib["aria-label"] for each in drawings]
    assert titles == [
        "Latency by percentile",
        "Turn",
        "Time to first token",
        "Time between tokens",
        "Operations",
        "Tokens",
        "Errors",
        "Memory of org/m",
    ]
    ElementTree.fromstring(
        page.partition("<body>")[2].partition("</body>")[0].join(("<a>", "</a>")).replace("<br>", "")
    )


numbers = st.floats(0, 1e9)


@example([(0.0, 5e-324), (5e-324, 0.0)], False, False)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_any_points_are_drawn_inside(points: list[tuple[float, float]], log: bool, percentile: bool) -> None:
    if percentile:
        points = [(x % 100, y) for x, y in points]
    plot = Plot(
        "p", "t", "ms", [Line("a", points, True), Line("b", [])], "percentile" if percentile else "seconds", log
    )
    drawn = ElementTree.fromstring(svg(plot))
    places = [place for line in drawn.iter("polyline") for place in line.attrib["points"].split()]
    assert len(places) == len(points)
    for place in places:
        x, y = map(float, place.split(","))
        assert 40 <= x <= 640
        assert 30 <= y <= 270


def test_pictures(tmp_path: Path) -> None:
    found = png.save(plots(report(a_run()))[:2], tmp_path)
    assert [path.name for path in found] == ["latency.png", "turn_over_time.png"]
    for path in found:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


def test_two_reports_side_by_side() -> None:
    a, b = report(a_run()), report(a_run(2.0, seed=1))
    found = compare.compare(a, b)
    assert found["ratios"]["turn"]["p50"] == pytest.approx(2, rel=0.01)
    assert found["ratios"]["inter_token"]["max"] == pytest.approx(1, rel=0.01)
    assert found["differs"] == {"seed": (0, 1)}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(compare.table(a, b))
    assert re.search(r"turn +mean, ms +500 +1,000 +2\.00", console.export_text())


@given(st.lists(st.floats(1e-6, 3000), min_size=1, max_size=60))
def test_a_histogram_is_right_to_three_digits(seconds: list[float]) -> None:
    histogram = new_histogram()
    for each in seconds:
        put(histogram, each)
    told = summary(histogram)
    names = {"min": 0, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "p99.9": 99.9, "max": 100}
    right = np.percentile(np.array(seconds) * 1e3, list(names.values()), method="inverted_cdf")
    assert told["count"] == len(seconds)
    assert [told[name] for name in names] == pytest.approx(list(right), rel=1e-3, abs=1e-3)
    assert told["mean"] == pytest.approx(1e3 * statistics.mean(seconds), rel=1e-3, abs=1e-3)


def test_a_snapshot_is_one_line() -> None:
    recorder = Recorder(0.0, (0.0, 1.0), 0.5, Slo())
    recorder.add(Sample("step", 0.1, 0.1, 0.2))
    snapshot = recorder.take(0.4)
    assert (snapshot.interval, Snapshot.model_validate_json(snapshot.model_dump_json())) == (0, snapshot)
    assert recorder.take(0.6).measures == {}


def test_outputs_are_compared() -> None:
    array = np.ones((1, 2, 3), np.float32)
    assert compare_outputs([array, "a", [1]], [array, "a", [1]]) == 0
    assert compare_outputs([array], [array + 1e-4]) == pytest.approx(1e-4, rel=0.01)
    for other in (array + 0.1, array[:, :1], array * np.nan, "a"):
        assert compare_outputs([array], [other]) is None
    assert compare_outputs(["a"], ["b"]) is None
    assert compare_outputs([[1, 2]], [[1, 3]]) is None
    assert compare_outputs(["a"], ["a", "b"]) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.012"), (1.5, "1.50"), (99.94, "99.9"), (12345.6, "12,346")]
)
def test_three_digits(value: float, text: str) -> None:
    assert digits(value) == text
