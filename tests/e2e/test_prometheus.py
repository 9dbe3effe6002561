"""Prometheus itself scrapes the real server, with the rules that are deployed; promtool reads the same numbers. Needs
Debian's package `prometheus`."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from keypast.keys import new_key, write_keys
from tests.e2e.test_server import ROOT, Server
from tests.metric_docs import documented
from tests.service.fakes import KINDS

pytestmark = pytest.mark.slow

DEPLOYED = ROOT / "deploy" / "prometheus"


def program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"{name} is missing: apt-get install prometheus"
    return found


@contextlib.contextmanager
def prometheus(folder: Path, target: str, key: str) -> Iterator[str]:
    """Its address. It runs with what is deployed, but for the target, where the key lies, and how often it asks."""
    config = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (folder / "key").write_text(key)
    job["authorization"]["credentials_file"] = str(folder / "key")
    job["static_configs"] = [{"targets": [target]}]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOYED / "rules.yml", folder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    options = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data")
    command = [program("prometheus"), *options, f"--web.listen-address={address}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def asked(address: str, path: str, **parameters: str) -> Any:
    """What it answers, or nothing while it starts."""
    try:
        reply = httpx.get(f"{address}/api/v1/{path}", params=parameters)
        return reply.json()["data"] if reply.status_code == 200 else {}
    except httpx.TransportError:
        return {}


def until_it_says(address: str, query: str, value: str) -> None:
    deadline, found = time.monotonic() + 60, ""
    while time.monotonic() < deadline:
        result = asked(address, "query", query=query).get("result", [])
        found = result[0]["value"][1] if result else ""
        if found == value:
            return
        time.sleep(0.2)
    raise AssertionError(f"{query} is {found!r}, not {value!r}")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, str, str]:
    """A file of keys; a user's and Prometheus' own."""
    (user, his), (scraper, its) = new_key("alice", "user"), new_key("prometheus", "metrics")
    write_keys(tmp_path / "keys", [his, its])
    return tmp_path / "keys", user, scraper


def test_prometheus_counts_what_the_service_did(tmp_path: Path, keys: tuple[Path, str, str]) -> None:
    file, user, scraper = keys
    with Server("tests.e2e.quick_service", keys_file=str(file)) as server:
        address = server.address()
        with httpx.Client(base_url=address, headers={"authorization": f"Bearer {user}"}) as client:
            for _ in range(3):
                path = client.post("/v1/sessions", json={"model": "letters"}).headers["location"]
                assert client.post(f"{path}/prefill", json=KINDS["decoder"].json(2)).status_code == 200
        with prometheus(tmp_path, address.removeprefix("http://"), scraper) as told:
            until_it_says(told, 'up{job="keypast"}', "1")
            until_it_says(told, "keypast_ready", "1")
            until_it_says(told, 'keypast_positions_total{model="letters",operation="prefill"}', "6")
            until_it_says(told, 'sum(keypast_sessions{model="letters"})', "3")
            names = set(asked(told, "label/__name__/values"))
            assert {name for name, metric in documented().items() if metric.kind == "gauge"} <= names
            rules = [rule for group in asked(told, "rules")["groups"] for rule in group["rules"]]
            assert rules
            assert [rule["name"] for rule in rules if rule.get("lastError")] == []
            assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_prometheus_sees_a_key_that_does_not_open(tmp_path: Path, keys: tuple[Path, str, str]) -> None:
    file, user, _ = keys
    with Server("tests.e2e.quick_service", keys_file=str(file)) as server:
        address = server.address()
        with prometheus(tmp_path, address.removeprefix("http://"), user) as told:
            until_it_says(told, 'up{job="keypast"}', "0")
            (target,) = asked(told, "targets")["activeTargets"]
            assert "403" in target["lastError"]


def test_promtool_finds_nothing_to_say(keys: tuple[Path, str, str]) -> None:
    file, user, scraper = keys
    with Server("tests.e2e.quick_service", keys_file=str(file)) as server:
        address = server.address()
        with httpx.Client(base_url=address, headers={"authorization": f"Bearer {user}"}) as client:
            path = client.post("/v1/sessions", json={"model": "letters"}).headers["location"]
            assert client.post(f"{path}/prefill", json=KINDS["decoder"].json(2)).status_code == 200
            assert client.post(f"{path}/generate", json={"max_tokens": 3}).status_code == 200
            assert client.get("/nowhere").status_code == 404
        text = httpx.get(f"{address}/metrics", headers={"authorization": f"Bearer {scraper}"}).text
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_promtool_reads_the_rules() -> None:
    done = subprocess.run(
        [program("promtool"), "check", "rules", DEPLOYED / "rules.yml"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
