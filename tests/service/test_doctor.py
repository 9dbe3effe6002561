"""What the machine is found to be, and what is said of it."""

import socket
from dataclasses import replace

import pytest

from keypast.doctor import Finding
from service.doctor import Facts, examine, judge, look_around
from service.settings import Settings

GIB = 1 << 30
GOOD = Facts(
    python="3.11.7",
    torch="2.13.0",
    device="a processor, 2 cores",
    gpu=False,
    rates={"float32": 95.0, "bfloat16": 440.0},
    read=34.0,
    kernels="avx512",
    kernels_fault="",
    memory=16 * GIB,
    disk=50 * GIB,
    port_free=True,
)


def named(facts: Facts, name: str, settings: Settings | None = None) -> Finding:
    return next(finding for finding in judge(facts, settings or Settings()) if finding.name == name)


def test_a_good_machine_has_nothing_to_be_done() -> None:
    report = examine({}, lambda _: GOOD)
    assert report.ok
    assert {(finding.state, finding.fix) for finding in report.findings} == {("ok", "")}
    assert report.numbers == {
        "float32_gflops": 95.0,
        "bfloat16_gflops": 440.0,
        "read_gbs": 34.0,
        "memory_bytes": 16 * GIB,
        "disk_bytes": 50 * GIB,
    }
    assert named(GOOD, "memory").found == "16.0 GiB free, 4.0 GiB of it for keys and values"


@pytest.mark.parametrize(
    ("facts", "settings", "name", "state", "fix"),
    [
        (
            replace(GOOD, kernels="", kernels_fault="not built yet"),
            Settings(),
            "kernels",
            "note",
            "engine.kernels.build",
        ),
        (GOOD, Settings(device="cuda"), "device", "bad", "KEYPAST_DEVICE=auto"),
        (GOOD, Settings(kv_memory="17GiB"), "memory", "bad", "KEYPAST_KV_MEMORY"),
        (GOOD, Settings(kv_memory="90%"), "memory", "note", "KEYPAST_KV_MEMORY"),
        (replace(GOOD, disk=1000), Settings(), "disk", "note", "KEYPAST_CACHE_DIR"),
        (replace(GOOD, port_free=False), Settings(), "port", "note", "--port 0"),
    ],
)
def test_what_is_wrong_comes_with_its_fix(facts: Facts, settings: Settings, name: str, state: str, fix: str) -> None:
    finding = named(facts, name, settings)
    assert finding.state == state
    assert fix in finding.fix
    others = [each for each in judge(facts, settings) if each.name != name]
    assert {each.state for each in others} == {"ok"}


def test_a_gpu_needs_no_kernels_built() -> None:
    assert named(replace(GOOD, gpu=True, kernels=""), "kernels").state == "ok"


def test_a_wrong_setting_is_all_that_is_told() -> None:
    report = examine({"KEYPAST_PORT": "http"})
    assert not report.ok
    (finding,) = report.findings
    assert finding.found.startswith("KEYPAST_PORT=http")


def test_this_machine() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        facts = look_around(Settings(port=taken.getsockname()[1], device="cpu"))
    assert not facts.port_free
    assert not facts.gpu
    assert min(facts.rates.values()) > 0
    assert facts.read > 0
    assert facts.memory > 1 << 20
    assert bool(facts.kernels) != bool(facts.kernels_fault)
