"""Arrivals: the times are those of the rate; waits end on time."""

import asyncio
import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keypast.loadtest.arrival import Arrival, Rate
from keypast.loadtest.clock import Clock
from keypast.loadtest.search import find_max
from keypast.loadtest.slo import Slo

pytestmark = pytest.mark.anyio


def times(begin: float, end: float, gaps: str, seconds: float = 10, seed: int = 0) -> list[float]:
    arrival = Arrival.model_validate({"rate": {"begin": begin, "end": end}, "gaps": gaps})
    return list(arrival.times(seconds, seed))


def test_fixed_gaps() -> None:
    assert times(4, 4, "fixed", 1) == [0, 0.25, 0.5, 0.75]


@settings(max_examples=30)
@given(st.floats(0, 50), st.floats(0.1, 50), st.floats(0.1, 10))
def test_a_ramp_has_as_many_as_its_integral(begin: float, end: float, upto: float) -> None:
    found = times(begin, end, "fixed")
    integral = begin * upto + (end - begin) * upto**2 / 20
    assert sum(at < upto for at in found) == pytest.approx(integral, abs=1.01)
    assert found == sorted(found)


def test_poisson_gaps_are_exponential() -> None:
    found = times(200, 200, "poisson", 50)
    gaps = [after - before for before, after in pairwise(found)]
    assert statistics.mean(gaps) == pytest.approx(1 / 200, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 200, rel=0.05)
    assert found == times(200, 200, "poisson", 50)
    assert found != times(200, 200, "poisson", 50, seed=1)


def test_what_an_arrival_is_called() -> None:
    assert str(Arrival(concurrency=3)) == "3 at a time"
    assert str(Arrival(rate=Rate(begin=1, end=20))) == "1 to 20 a second, poisson"
    with pytest.raises(ValueError, match="exactly one"):
        Arrival()
    with pytest.raises(ValueError, match="above 0"):
        Rate(begin=0, end=0)


async def test_a_wait_is_neither_short_nor_a_millisecond_long() -> None:
    late = []
    with Clock() as clock:
        waiting = asyncio.create_task(clock.until(clock.now() + 60))
        for _ in range(60):
            due = clock.now() + 0.0003  # which asyncio.sleep makes a whole millisecond
            await clock.until(due)
            late.append(clock.now() - due)
        waiting.cancel()
    assert -1e-4 <= min(late) < 4e-4  # the best of them: the machine may be busy


async def test_waits_end_in_their_order() -> None:
    ended = []

    async def wait(clock: Clock, at: float, name: str) -> None:
        await clock.until(at)
        ended.append(name)

    with Clock() as clock:
        began = clock.now() + 0.5  # by then all of them wait, on a busy machine too
        await asyncio.gather(*(wait(clock, began + at, name) for at, name in ((0.03, "c"), (0.01, "a"), (0.02, "b"))))
    assert ended == ["a", "b", "c"]


@settings(max_examples=20)
@given(st.floats(0.01, 5000), st.floats(0.1, 100))
async def test_the_highest_rate_is_found(limit: float, first: float) -> None:
    async def holds(rate: float) -> bool:
        return rate <= limit

    best, trials = await find_max(first, holds)
    assert best is not None
    assert limit / 1.06 <= best <= limit
    assert len(trials) < 40


async def test_no_rate_holds() -> None:
    async def holds(rate: float) -> bool:
        return False

    assert (await find_max(1.0, holds))[0] is None


def test_objectives() -> None:
    slo = Slo.parse(["ttft.p95=300ms, step=50ms", "errors=0.5%", "queue.mean=1.5s"])
    assert [(each.measure, each.at, each.limit) for each in slo.objectives] == [
        ("ttft", "p95", 300),
        ("step", "p99", 50),
        ("queue", "mean", 1500),
    ]
    assert slo.errors == 0.005
    assert slo.within({"ttft": 299, "step": 50})
    assert slo.within({"turn": 1e9})
    assert not slo.within({"ttft": 301})


@pytest.mark.parametrize("text", ["ttft<300ms", "ttft=300", "ttft=1%", "errors=5ms", "speed=3ms", ""])
def test_what_is_no_objective(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no objective|is not measured"):
        Slo.parse([text])
