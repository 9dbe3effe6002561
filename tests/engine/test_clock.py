"""The engine's own time."""

import time

import pytest

from engine.clock import now

ROUNDING = 1e-6  # of seconds since 1970


def test_it_tells_the_time_and_runs_as_time_passes() -> None:
    assert now() == pytest.approx(time.time(), abs=1)
    steady = [time.monotonic()]
    began = now()
    steady.append(time.monotonic())
    time.sleep(0.01)
    steady.append(time.monotonic())
    passed = now() - began
    steady.append(time.monotonic())
    assert steady[2] - steady[1] - ROUNDING < passed < steady[3] - steady[0] + ROUNDING
