"""What an operator's machines ask of the real server: numbers, and whether it is ready."""

import os
import socket
import subprocess
import sys

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.healthcheck import is_ready
from service.settings import Settings
from tests.e2e.test_server import ROOT, Server

QUICK = "tests.e2e.quick_service"


def told(address: str) -> dict[tuple[str, str], float]:
    """Counters, by name and first label's value."""
    reply = httpx.get(f"{address}/metrics")
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_the_real_server_is_scraped() -> None:
    with Server(QUICK) as server:
        address = server.address()
        port = int(address.rpartition(":")[2])
        head = httpx.head(f"{address}/metrics")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 1000
        assert httpx.get(f"{address}/livez", headers={"a": "b" * 40_000}).status_code == 431
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"this is no HTTP\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
        found = told(address)
        assert found["keypast_errors_total", "head_too_large"] == 1
        assert found["keypast_errors_total", "malformed"] == 1
        assert found["process_resident_memory_bytes", ""] > 1 << 20

        assert is_ready(Settings(port=port))
        assert is_ready(Settings(port=port, host="0.0.0.0"))
        environment = os.environ | {"KEYPAST_PORT": str(port)}
        checked = subprocess.run([sys.executable, "-m", "service.healthcheck"], cwd=ROOT, env=environment, check=False)
        assert checked.returncode == 0
    assert not is_ready(Settings(port=port)), "it is gone"


def test_what_is_no_service_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.close()
        environment = os.environ | {"KEYPAST_PORT": str(port)}
        checked = subprocess.run([sys.executable, "-m", "service.healthcheck"], cwd=ROOT, env=environment, check=False)
        assert checked.returncode == 1
