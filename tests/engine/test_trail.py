"""When an operation came to each stop, by a clock that is told the time: every batch takes a second."""

import numpy as np
import pytest

from engine.batch import Append, ExportPast, Generate, Once, Truncate
from engine.errors import ModelFailed
from engine.trail import Trail
from tests.engine.test_tally import House

START = 1000.0


@pytest.fixture
def house() -> House:
    house = House(token_budget=4)
    house.seconds = 1.0
    return house


def times(trail: Trail) -> tuple[float | None, ...]:
    """Since the start."""
    found = (trail.turn, trail.scheduled, trail.computed, trail.committed)
    return tuple(None if at is None else at - START for at in found)


def append(session: str, *tokens: int, trail: Trail | None = None, once: Once | None = None) -> Append:
    return Append(session, {"token_ids": np.array([tokens])}, trail=trail, once=once)


def test_an_append_in_three_batches(house: House) -> None:
    session, trail = house.engine.create_session("decoder").id, Trail()
    house.engine.submit(append(session, *range(10), trail=trail))
    house.tick(0.5)
    house.run()
    assert (trail.model, trail.batches, times(trail)) == ("decoder", 3, (0.0, 0.5, 3.5, 3.5))


def test_one_that_waits_for_the_sessions_other_one(house: House) -> None:
    session, trail = house.engine.create_session("decoder").id, Trail()
    house.engine.submit(append(session, 1, 2))
    house.engine.submit(append(session, 3, trail=trail))
    assert times(trail) == (None, None, None, None)
    house.run()
    assert times(trail) == (1.0, 1.0, 2.0, 2.0)


def test_a_generation(house: House) -> None:
    session, trail = house.engine.create_session("decoder").id, Trail()
    prompt = {"token_ids": np.array([[1, 2, 3]])}
    house.finish(Generate(session, 3, inputs=prompt, trail=trail))
    assert (times(trail), trail.batches) == ((0.0, 0.0, 4.0, 4.0), 4)  # the prompt, which draws, and three tokens
    assert trail.first_token == START + 2


def test_what_fails_is_not_committed(house: House) -> None:
    session, trail = house.engine.create_session("decoder").id, Trail()
    house.runner.poison = 5
    operation = append(session, 5, trail=trail)
    house.engine.submit(operation)
    house.run()
    with pytest.raises(ModelFailed):
        operation.future.result(0)
    assert times(trail) == (0.0, 0.0, 1.0, None)


def test_what_never_got_blocks_was_never_scheduled() -> None:
    house = House(blocks=2, wait_seconds=5.0)
    first, second = (house.engine.create_session("decoder").id for _ in range(2))
    house.append(first, *range(16))
    trail = Trail()
    house.engine.submit(append(second, 1, trail=trail))
    house.tick(6)
    house.run()
    assert times(trail) == (0.0, None, None, None)


def test_what_is_done_at_once_or_was_done_before_has_no_turn(house: House) -> None:
    session, back, again = house.engine.create_session("decoder").id, Trail(), Trail()
    house.finish(append(session, 1, 2, once=Once(b"a", "a")))
    house.finish(append(session, 1, 2, once=Once(b"a", "a"), trail=again))
    house.finish(Truncate(session, 1, trail=back))
    assert times(again) == times(back) == (None, None, None, 1.0)


def test_a_past_that_goes_out(house: House) -> None:
    session, trail = house.engine.create_session("decoder").id, Trail()
    house.append(session, 1, 2)
    house.finish(ExportPast(session, trail=trail))
    assert (times(trail), trail.batches) == ((1.0, 1.0, 2.0, 2.0), 1)
