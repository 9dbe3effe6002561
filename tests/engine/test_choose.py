"""Which backend a device gets."""

from pathlib import Path

import pytest

from engine.attention import choose
from engine.attention.base import Backend
from engine.attention.cuda import TritonBackend
from engine.attention.timing import try_out
from engine.errors import InvalidInput
from tests.engine.compile_triton import Recorder

CACHE = Path.home() / ".cache" / "keypast"


def test_auto_is_the_fastest_that_the_device_has() -> None:
    warnings: list[str] = []
    tried: list[str] = []

    def runs(backend: Backend, device: str) -> None:
        tried.append(f"{backend.name} on {device}")

    names = [choose("auto", device, CACHE, warnings.append, tried=runs).name for device in ("cpu", "cuda", "cuda:1")]
    assert (names, warnings) == (["cpu", "triton", "triton"], [])
    assert tried == ["triton on cuda", "triton on cuda:1"]


def test_one_that_is_installed_and_does_not_run_is_told_of() -> None:
    def fails(backend: Backend, device: str) -> None:
        raise RuntimeError("Failed to find C compiler")

    warnings: list[str] = []
    assert choose("auto", "cuda", CACHE, warnings.append, tried=fails).name == "sdpa"
    reason = "its kernels do not run here (RuntimeError: Failed to find C compiler)"
    assert warnings == [f"attention runs on the slow path (several times slower): {reason}"]
    with pytest.raises(InvalidInput, match="triton is not available: its kernels do not run here"):
        choose("triton", "cuda", CACHE, print, tried=fails)


def test_trying_it_runs_a_kernel() -> None:
    try_out(TritonBackend(), "cpu")  # in the interpreter
    with pytest.raises(RuntimeError, match="norm of ones"):
        try_out(TritonBackend(kernels=Recorder()), "cpu")  # whose kernels do nothing


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_slow_truth_runs_anywhere(device: str) -> None:
    assert choose("sdpa", device, CACHE, print).name == "sdpa"


@pytest.mark.parametrize(("name", "device"), [("triton", "cpu"), ("cpu", "cuda")])
def test_a_backend_of_another_device_is_refused(name: str, device: str) -> None:
    with pytest.raises(InvalidInput, match=f"{name} does not run on the device {device}; say auto"):
        choose(name, device, CACHE, print)


def test_an_unknown_backend_is_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(InvalidInput, match="must be one of auto, cpu, triton, flashinfer, sdpa, got 'fast'"):
        choose("fast", "cpu", CACHE, print)
