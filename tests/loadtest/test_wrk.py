"""The same route by wrk, an independent client in C: both must see the same server. Needs Debian's package `wrk`."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from typer.testing import CliRunner

from keypast.cli import app
from tests.e2e.test_server import Server
from tests.loadtest.fake_server import Answer, FakeServer, always

pytestmark = pytest.mark.slow

ROUNDS = 3


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


@contextmanager
def on_core(which: int) -> Iterator[None]:
    """What is started inside runs on one core only: the server on one, either client on another, so that neither of
    them takes from the server what the other one leaves."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[which]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def before_all_others(server: int) -> Iterator[None]:
    """This process and what it starts, and the server's: for seconds, and where the system lets us."""
    threads = [0, *map(int, os.listdir(f"/proc/{server}/task"))]
    with suppress(PermissionError):
        for thread in threads:
            os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def compared(url: str, connections: int) -> tuple[float, float]:
    """The ratios of ours to wrk's, of rates and of p50. Measured in turns; the best of each, as what else the machine
    does only makes it worse."""
    pairs = [(ours(url, connections, 1), wrk(f"{url}/livez", connections, 1)) for _ in range(ROUNDS)]
    mine, theirs = zip(*pairs, strict=True)
    rates = max(rate for rate, _ in mine) / max(rate for rate, _ in theirs)
    return rates, min(p50 for _, p50 in mine) / min(p50 for _, p50 in theirs)


def test_a_trivial_route_of_the_service() -> None:
    """The server is what is full. It writes a line for each request: with less to do, it does a tenth less for requests
    that come in bursts, as ours do."""
    with on_core(0):
        running = Server("tests.e2e.quick_service", log_level="debug")
    with running as server:
        address = server.address()
        with on_core(-1), before_all_others(server.process.pid):
            rates, p50 = compared(address, 16)
    assert rates == pytest.approx(1, abs=0.1)
    assert p50 == pytest.approx(1, abs=0.1)


def test_a_server_that_takes_20_ms() -> None:
    with FakeServer(always(Answer(), 0.02)) as server:
        rates, p50 = compared(server.url, 8)
    assert rates == pytest.approx(1, abs=0.1)
    assert p50 == pytest.approx(1, abs=0.1)
