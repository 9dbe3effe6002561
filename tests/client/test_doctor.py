"""`keypast doctor`: what it says to a person and to a script."""

import json

import pytest
from typer.testing import CliRunner, Result

from keypast import Client
from keypast.cli import app
from keypast.cli_doctor import Around
from keypast.doctor import Finding, Report
from keypast.schemas import Code

from .fake import FakeService, problem

FINE = Report([Finding("device", "ok", "a [fast] one")], {"float32_gflops": 95.5})
POOR = Report([Finding("kernels", "note", "not built yet", "build them"), Finding("memory", "bad", "none", "buy some")])


def run(report: Report, *arguments: str, service: FakeService | None = None) -> Result:
    fake = service or FakeService(max_length=64)
    around = Around(lambda: report, lambda url: Client(url, transport=fake.transport, sleep=lambda _: None))
    return CliRunner().invoke(app, ["doctor", *arguments], obj=around)


def test_all_is_well() -> None:
    result = run(FINE)
    assert (result.exit_code, result.stderr) == (0, "")
    device, service = (line.split(maxsplit=2) for line in result.stdout.splitlines())
    assert [device[0], device[1], device[2].strip()] == ["ok", "device", "a [fast] one"]
    assert service[:2] == ["ok", "service"]
    assert service[2].strip().startswith("keypast ")
    assert service[2].strip().endswith(" answers, with attention, decoder")


def test_what_is_to_be_done_stands_below_what_was_found() -> None:
    result = run(POOR)
    assert result.exit_code == 1
    words = [line.split() for line in result.stdout.splitlines()[:4]]
    assert words == [
        ["look", "kernels", "not", "built", "yet"],
        ["→", "build", "them"],
        ["bad", "memory", "none"],
        ["→", "buy", "some"],
    ]


def test_for_machines() -> None:
    told = json.loads(run(FINE, "--json").stdout)
    assert (told["ok"], told["numbers"]) == (True, {"float32_gflops": 95.5})
    assert told["findings"][0] == {"name": "device", "state": "ok", "found": "a [fast] one", "fix": ""}
    bad = run(POOR, "--json")
    assert (bad.exit_code, json.loads(bad.stdout)["ok"]) == (1, False)


def test_a_service_that_refuses_is_worth_a_look() -> None:
    service = FakeService(max_length=64)
    service.answers = [problem(Code.NOT_READY, "loading", retry_after=5)] * 3
    found = json.loads(run(FINE, "--json", service=service).stdout)["findings"][-1]
    assert (found["name"], found["state"]) == ("service", "note")
    assert found["found"] == "loading; try again in 5 s"


def test_a_wrong_address_is_bad() -> None:
    result = run(FINE, "--url", "there")
    assert result.exit_code == 1
    assert "set KEYPAST_URL" in result.stdout


def test_a_client_alone_says_so() -> None:
    def missing() -> Report:
        raise ModuleNotFoundError(name="torch")

    fake = FakeService(max_length=64)
    around = Around(missing, lambda url: Client(url, transport=fake.transport))
    result = CliRunner().invoke(app, ["doctor"], obj=around)
    assert result.exit_code == 0
    assert "torch is not installed: this is a client only" in result.stdout
    assert "pip install 'keypast[server]'" in result.stdout


@pytest.mark.parametrize(("state", "ok"), [("ok", True), ("note", True), ("bad", False)])
def test_only_what_is_bad_fails(state: str, ok: bool) -> None:
    assert Report([Finding("a", state, "b")]).ok is ok  # type: ignore[arg-type]
