"""`docker compose` itself, over Podman: valid files, the service and Prometheus side by side, a load test."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.containers.podman import ROOT, Podman, until

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3000)]

# Ports that nobody else has.
HERE = """
services:
  keypast: {ports: !override ["127.0.0.1:18000:8000"]}
  prometheus: {ports: !override ["127.0.0.1:19090:9090"]}
"""
PROMETHEUS = "http://127.0.0.1:19090"
Compose = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the compose files and of what they name, with secrets made as the docs say."""
    folder = tmp_path_factory.mktemp("keypast")
    for path in ROOT.glob("docker-compose*.yml"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("secrets"))
    command = folder / "command"
    command.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m keypast.cli "$@"\n')
    command.chmod(0o755)
    made = subprocess.run([folder / "deploy/make-secrets", command], capture_output=True, text=True, check=True)
    (folder / "key").write_text(made.stdout.strip())
    (folder / "here.yml").write_text(HERE)
    return folder


@pytest.fixture(scope="module")
def compose(podman: Podman, project: Path) -> Iterator[Compose]:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = (podman.folder / "tools/bin/docker-compose", "-f", "docker-compose.yml", "-f", "here.yml")
        return podman.command(*command, *arguments, cwd=project)

    address = podman.environment["DOCKER_HOST"]
    serving = subprocess.Popen(
        ["podman", "system", "service", "--time=0", address], env=podman.environment, stderr=subprocess.DEVNULL
    )
    try:
        until(Path(address.removeprefix("unix://")).is_socket, 20)
        yield call
    finally:
        serving.terminate()
        serving.wait(20)


@pytest.fixture(scope="module")
def up(podman: Podman, compose: Compose, image: str, tester: str) -> Iterator[httpx.Client]:
    """The service's client."""
    compose("up", "-d", "--no-build", "--pull=never", "keypast", "prometheus")
    try:
        podman.healthy("keypast-keypast-1")
        with httpx.Client(base_url="http://127.0.0.1:18000") as client:
            yield client
    finally:
        compose("--profile=loadtest", "down", "-v", "-t", "30")


def asked(query: str) -> list[dict[str, Any]]:
    """What Prometheus answers: series with a metric and a value."""
    try:
        told = httpx.get(f"{PROMETHEUS}/api/v1/query", params={"query": query}).json()
    except httpx.TransportError:
        return []
    found: list[dict[str, Any]] = told["data"]["result"]
    return found


@pytest.mark.parametrize(
    ("options", "services"),
    [
        ([], {"keypast", "prometheus", "grafana"}),
        (["--profile=loadtest"], {"keypast", "prometheus", "grafana", "loadtest"}),
        (["-f", "docker-compose.gpu.yml"], {"keypast", "prometheus", "grafana"}),
    ],
)
def test_the_files_are_valid(compose: Compose, options: list[str], services: set[str]) -> None:
    told = json.loads(compose(*options, "config", "--format=json").stdout)
    assert set(told["services"]) == services
    assert ("devices" in json.dumps(told["services"]["keypast"]["deploy"])) == ("docker-compose.gpu.yml" in options)


def test_the_service_asks_for_the_key_that_was_made(up: httpx.Client, project: Path) -> None:
    body = {"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    assert up.post("/v1/completions", json=body).status_code == 401
    key = {"authorization": f"Bearer {(project / 'key').read_text()}"}
    told = up.post("/v1/completions", json=body, headers=key, timeout=60)
    assert "Paris" in told.json()["choices"][0]["text"]


@pytest.mark.usefixtures("up")
def test_prometheus_scrapes_the_service_and_reads_its_rules(podman: Podman) -> None:
    until(lambda: [each["value"][1] for each in asked('up{job="keypast"}')] == ["1"])
    assert [each["value"][1] for each in asked("keypast_ready")] == ["1"]
    (job,) = httpx.get(f"{PROMETHEUS}/api/v1/targets").json()["data"]["activeTargets"]
    assert (job["health"], job["lastError"]) == ("up", "")
    groups = httpx.get(f"{PROMETHEUS}/api/v1/rules").json()["data"]["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
    assert not [rule for group in groups for rule in group["rules"] if rule.get("lastError")]
    podman("exec", "keypast-prometheus-1", "promtool", "check", "config", "/etc/prometheus/prometheus.yml")


@pytest.mark.usefixtures("up")
def test_the_load_test_runs_beside_the_service_and_is_seen(compose: Compose) -> None:
    """Not `depends_on`: health never advances where no systemd runs Podman's checks."""
    options = ("chat", "-c", "2", "-n", "4")
    done = compose("--profile=loadtest", "run", "--rm", "-T", "--no-deps", "loadtest", *options)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["errors"] == {}
    until(lambda: any(float(each["value"][1]) > 0 for each in asked('keypast_positions_total{operation="generate"}')))


@pytest.mark.usefixtures("up")
def test_it_stops_by_itself(podman: Podman, compose: Compose) -> None:
    """The last one: the service is gone."""
    compose("stop", "keypast")
    state = json.loads(podman("inspect", "keypast-keypast-1").stdout)[0]["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
