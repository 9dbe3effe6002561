"""`keypast loadtest` as it is typed: processes and all, against a server on a thread."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from keypast.cli import app
from tests.loadtest.fake_server import Answer, Asked, FakeServer, always

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["loadtest", *arguments])

    return run


def last_line(result: Result) -> Any:
    return json.loads(result.stdout.splitlines()[-1])


def test_a_whole_run(run: Run, tmp_path: Path) -> None:
    """Two processes, one plain route; everything is written that is promised."""
    with FakeServer(always(Answer(), 0.01)) as server:
        out = str(tmp_path / "out")
        timing = ("--rate", "100", "--arrival", "fixed", "-d", "0.6", "--warmup", "0.2", "--workers", "2")
        slo = ("--slo", "request.p50=1s,errors=1%")
        result = run("ping", "--url", server.url, *timing, "--check", "2", *slo, "--out", out)
        assert len(server.asked) == 80 + 2 * 2 + server.paths().count("/v1/capacity")
    assert (result.exit_code, result.stderr.count("written")) == (0, 1), result.output
    told = last_line(result)
    assert told["measures"]["request"]["count"] == 60
    assert 10 <= told["measures"]["request"]["min"] < 40
    assert (told["check"]["equal"], told["visits"]["failed"], len(told["busy"])) == (4, 0, 2)
    assert re.search(r"request +60 ", result.stdout)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.json", "report.html", "summary.csv", "series.csv", "latency.png"} <= written
    kept = json.loads((tmp_path / "out/report.json").read_text())
    assert kept["curves"]["request"][-1] == [100.0, told["measures"]["request"]["max"]]

    again = run("--compare", *[str(tmp_path / "out/report.json")] * 2)
    assert (again.exit_code, last_line(again)["ratios"]["request"]["p99"]) == (0, 1.0)


def test_an_slo_that_is_missed_is_an_exit_code(run: Run) -> None:
    with FakeServer(always(Answer(500))) as server:
        result = run("ping", "--url", server.url, "--target", "openai", "-n", "3", "--slo", "errors=10%")
    assert (result.exit_code, last_line(result)["errors"]) == (3, {"request http_500": 3})
    assert "MISSED" in result.stdout


@pytest.mark.slow
def test_the_highest_rate_is_found(run: Run) -> None:
    """A server that is slow from 60 requests a second on."""
    lately: list[float] = []

    async def answer(asked: Asked) -> Answer:
        lately.append(asked.arrived)
        inside = [at for at in lately[-80:] if at > asked.arrived - 0.5]
        if len(inside) > 30:
            await asyncio.sleep(0.1)
        return Answer()

    with FakeServer(answer) as server:
        options = ("--arrival", "fixed", "--rate", "30", "-d", "0.5", "--warmup", "0.3", "--slo", "request.p95=60ms")
        result = run("ping", "--url", server.url, "--target", "openai", "--find-max", *options)
    assert result.exit_code == 0, result.output
    told = last_line(result)["find_max"]
    assert 40 < told["rate"] < 80
    assert [trial["holds"] for trial in told["trials"][:2]] == [True, True] or told["trials"][1]["rate"] == 60
    assert f"find-max    {told['rate']:g} visits a second" in re.sub(r"find-max +", "find-max    ", result.stdout)


def test_what_the_tester_can_do_itself(run: Run) -> None:
    result = run("--ceiling", "-c", "4", "-d", "0.3", "--workers", "1")
    assert result.exit_code == 0, result.output
    (found,) = last_line(result)["ceiling"]
    assert (found["connections"], found["workers"]) == (4, 1)
    assert found["requests_per_second"] > 100
    assert 5 < found["cpu_us"] < 2000


def test_ctrl_c_ends_a_run_early_and_tells_what_there_is() -> None:
    with FakeServer(always(Answer(), 0.01)) as server:
        command = [sys.executable, "-m", "keypast.cli", "loadtest", "ping", "--target", "openai", "--url", server.url]
        process = subprocess.Popen([*command, "-d", "60", "--warmup", "0"], stdout=PIPE, stderr=PIPE, text=True)
        while len(server.asked) < 10:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in errors) == (0, False), errors
    told = json.loads(out.splitlines()[-1])
    assert told["stopped"]
    assert told["window"] < 30
    assert told["measures"]["request"]["count"] >= 9


def test_a_scenario_is_shown_to_begin_a_file_with(run: Run, tmp_path: Path) -> None:
    shown = run("tree", "--show")
    path = tmp_path / "mine.json"
    path.write_text(shown.stdout)
    assert json.loads(run(str(path), "--show").stdout) == json.loads(shown.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "'nothing' is neither a .toml or .json file nor one of chat,"),
        (["ping", "-c", "2", "-r", "2"], "give --concurrency (a closed loop) or --rate"),
        (["ping", "-r", "fast"], "--rate is visits a second (5), or from one to another (1..20), not 'fast'"),
        (["ping", "-r", "0"], "a rate must be above 0"),
        (["ping", "--arrival", "random"], "--arrival is poisson or fixed"),
        (["ping", "-d", "3", "-n", "3"], "give --duration or --count"),
        (["ping", "--slo", "speed=1s"], "'speed' is not measured"),
        (["ping", "--find-max"], "--find-max needs an --slo"),
        (["ping", "--target", "other"], "--target is keypast or openai"),
        (["ping", "--url", "host:80"], "http:// or https://"),
        (["chat", "--url", "http://127.0.0.1:9", "-n", "1"], "start the service with `keypast serve`"),
        (["chat", "--url", "http://127.0.0.1:9", "--target", "openai"], "is the server at http://127.0.0.1:9?"),
        (["--compare", "no.json", "no.json"], "no.json: No such file or directory"),
    ],
)
def test_a_wrong_command_is_one_line(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    failed = "--url" in arguments and "host:80" not in arguments  # the command line is well, the server is not there
    assert (result.exit_code, result.stdout) == (1 if failed else 2, "")
    assert result.stderr.startswith("keypast: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_has_examples(run: Run) -> None:
    text = run("--help").stdout
    assert "keypast loadtest chat -c 8 -d 30" in text
    assert "Exit codes" in text
