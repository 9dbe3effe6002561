"""What a client is told when the device has no memory left for its append."""

from engine.errors import DeviceFull
from service.errors import problem_of


def test_it_says_503_and_when_to_come_back() -> None:
    problem = problem_of(DeviceFull())
    assert (problem.status, problem.code, problem.retry_after) == (503, "device_full", 1.0)
