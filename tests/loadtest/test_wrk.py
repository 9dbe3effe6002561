"""The same route by wrk, an independent client in C: both must see the same server. Needs Debian's package `wrk`."""

import json
import re
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from keypast.cli import app
from tests.e2e.test_server import Server
from tests.loadtest.fake_server import Answer, FakeServer, always

pytestmark = pytest.mark.slow

ROUNDS = 5


def wrk(url: str, connections: int, seconds: int) -> tuple[float, float]:
    """(requests a second, p50 in ms)."""
    binary = shutil.which("wrk")
    assert binary is not None, "this test compares with wrk: apt-get install wrk"
    command = [binary, "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", url]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"Requests/sec: +([\d.]+)", told)
    p50 = re.search(r"50% +([\d.]+)(us|ms|s)", told)
    assert rate is not None
    assert p50 is not None
    return float(rate[1]), float(p50[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[p50[2]]


def ours(url: str, connections: int, seconds: int) -> tuple[float, float]:
    timing = ("-c", str(connections), "-d", str(seconds), "--warmup", "0.3", "--workers", "1")
    result = CliRunner().invoke(app, ["loadtest", "ping", "--target", "openai", "--url", url, *timing])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["errors"] == {}
    return told["rates"]["requests"], told["measures"]["request"]["p50"]


def compared(url: str, connections: int) -> tuple[float, float]:
    """The ratios of ours to wrk's, of rates and of p50. Measured in turns; the best of each, as what else the machine
    does only makes it worse."""
    pairs = [(ours(url, connections, 2), wrk(f"{url}/livez", connections, 2)) for _ in range(ROUNDS)]
    mine, theirs = zip(*pairs, strict=True)
    rates = max(rate for rate, _ in mine) / max(rate for rate, _ in theirs)
    return rates, min(p50 for _, p50 in mine) / min(p50 for _, p50 in theirs)


def test_a_trivial_route_of_the_service() -> None:
    """The server is what is full: 16 connections, a core of its own."""
    with Server("tests.e2e.quick_service", log_level="warning") as server:
        rates, p50 = compared(server.address(), 16)
    assert rates == pytest.approx(1, abs=0.1)
    assert p50 == pytest.approx(1, abs=0.1)


def test_a_server_that_takes_20_ms() -> None:
    with FakeServer(always(Answer(), 0.02)) as server:
        rates, p50 = compared(server.url, 8)
    assert rates == pytest.approx(1, abs=0.1)
    assert p50 == pytest.approx(1, abs=0.1)
