"""Which backend a device gets."""

from pathlib import Path

import pytest

from engine.attention import choose
from engine.errors import InvalidInput

CACHE = Path.home() / ".cache" / "keypast"


def test_auto_is_the_fastest_that_the_device_has() -> None:
    warnings: list[str] = []
    names = [choose("auto", device, CACHE, warnings.append).name for device in ("cpu", "cuda", "cuda:1")]
    assert (names, warnings) == (["cpu", "triton", "triton"], [])


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
