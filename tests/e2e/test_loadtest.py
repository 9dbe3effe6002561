"""The load tester against the real server over fake models: every kind of visit ends well, and tells the truth."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keypast import Client
from keypast.cli import app
from tests.e2e.test_server import Server

SCENARIO = {
    "name": "all",
    "visits": [
        {"kind": "chat", "turns": 2, "prompt": 2, "output": 4},
        {"kind": "chat", "session": False, "turns": 2, "prompt": 2, "output": 4},
        {"kind": "steps", "prompt": 5, "steps": {"low": 2, "high": 6}},
        {"kind": "steps", "takes": "tokens", "prompt": 5, "steps": 3},
        {"kind": "tree", "prompt": 4, "branches": 2, "levels": 2, "steps": 1},
        {"kind": "tree", "takes": "tensors", "prompt": 4, "branches": 2, "levels": 1, "steps": 2},
        {"kind": "request", "path": "/livez"},
    ],
}


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with Server("tests.e2e.quick_service") as server:
        yield server.address()


def load(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["loadtest", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_every_kind_of_visit(service: str, tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps(SCENARIO))
    told = load(str(path), "--url", service, "-n", "40", "-c", "2", "--check", "10", "--slo", "errors=0%")
    assert (told["errors"], told["visits"]) == ({}, {"begun": 40, "ended": 40, "failed": 0, "cut": 0})
    assert told["check"] | {"worst": 0} == {
        "equal": 10,
        "close": 0,
        "different": 0,
        "failed": 0,
        "worst": 0,
        "first": None,
    }
    measures = told["measures"]
    assert {"turn", "ttft", "inter_token", "prefill", "step", "fork", "request", "queue", "compute"} < measures.keys()
    assert measures["compute"]["max"] <= max(measures[name]["max"] for name in ("turn", "prefill", "step"))
    assert measures["create"]["count"] < measures["delete"]["count"]  # forks are deleted, too
    assert told["counts"]["output_tokens"] > 0
    with Client(service) as client:
        assert list(client.sessions.list()) == []


def test_an_attention_layer_for_a_while(service: str) -> None:
    scenario = ("attention", "--url", service, "-d", "1", "--warmup", "0.3")
    told = load(*scenario, "--rate", "10", "--slo", "errors=100%")
    assert (told["models"], told["stopped"], told["arrival"]) == (["echo"], False, "10 a second, poisson")
    assert told["measures"]["step"]["count"] > 0
    with Client(service) as client:
        assert list(client.sessions.list()) == []


def test_the_same_service_as_any_server_of_openais(service: str) -> None:
    told = load("chat", "--url", service, "--target", "openai", "-n", "2", "--slo", "errors=100%")
    assert told["models"] == ["letters"]
    assert "create" not in told["measures"]
