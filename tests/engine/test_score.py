"""A score answers as a prefill would, and leaves nothing behind."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine.batch import Append
from engine.errors import ModelFailed, Moved, PoolExhausted, SessionGone
from tests.engine.test_engine import DRAW, House
from tests.fakes import next_token

PAST = [5] * 20
LONG = list(range(30, 90)) * 2  # four chunks


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.engine.check()
    assert house.runner.faults == []


def state(house: House, *sessions: str) -> list[Any]:
    return [[house.engine.session(session) for session in sessions], house.engine.capacity()]


@pytest.mark.parametrize("past", [[], [5], [5] * 16, PAST])
@pytest.mark.parametrize("new", [[7], [7, 8, 9], [7] * 12, LONG])
def test_it_answers_as_a_prefill_and_changes_nothing(house: House, past: list[int], new: list[int]) -> None:
    session = house.open(past)
    before = state(house, session)
    score = house.append(session, new, want=DRAW, keep=False)
    assert state(house, session) == before
    append = house.append(session, new, want=DRAW)
    assert score.outputs == append.outputs == {"next_token": [next_token(past + new)]}
    assert (score.past_length, score.valid_length) == (append.past_length, append.valid_length)
    assert (score.version, append.version) == (len(past) > 0, (len(past) > 0) + 1)


@pytest.mark.parametrize("new", [[7], LONG])
def test_a_shared_tail_is_shared_again_afterwards(house: House, new: list[int]) -> None:
    parent = house.open(PAST)
    child = house.engine.fork(parent)[0].id
    before = state(house, parent, child)
    assert house.append(child, new, want=DRAW, keep=False).outputs["next_token"] == [next_token(PAST + new)]
    assert state(house, parent, child) == before
    for session in (parent, child):
        assert house.append(session, [8], want=DRAW).outputs["next_token"] == [next_token([*PAST, 8])]


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("at", [0, -1], ids=["first chunk", "last chunk"])
def test_a_failed_one_changes_nothing_either(house: House, forked: bool, at: int) -> None:
    session = house.open(PAST)
    if forked:
        house.engine.fork(session)
    before = state(house, session)
    new = list(LONG)
    house.runner.poison = new[at] = 96
    with pytest.raises(ModelFailed):
        house.append(session, new, keep=False)
    assert state(house, session) == before
    assert house.append(session, [8], want=DRAW).outputs["next_token"] == [next_token([*PAST, 8])]


def test_it_shares_a_batch_with_others(house: House) -> None:
    sessions = [house.open([token]) for token in range(4)]
    house.runner.batches.clear()
    submitted = [house.submit(session, [9], want=DRAW, keep=index % 2 == 0) for index, session in enumerate(sessions)]
    house.run()
    assert [append.future.result(0).outputs["next_token"] for append in submitted] == [
        [next_token([token, 9])] for token in range(4)
    ]
    assert len(house.runner.batches) == 1
    assert [house.lengths(session) for session in sessions] == [[2], [1], [2], [1]]


def test_its_turn_is_that_of_an_append(house: House) -> None:
    session = house.open([1])
    submitted = [house.submit(session, [token], want=DRAW, keep=token != 3) for token in (2, 3, 4)]
    refused = house.submit(session, [5], keep=False, expected_version=1)
    house.run()
    told = [append.future.result(0) for append in submitted]
    assert [result.outputs["next_token"] for result in told] == [
        [next_token(past)] for past in ([1, 2], [1, 2, 3], [1, 2, 4])
    ]
    assert [result.version for result in told] == [2, 2, 3]
    assert isinstance(refused.future.exception(0), Moved)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_fork_taken_meanwhile_has_the_committed_past_alone(house: House, batches: int) -> None:
    """The score has left its shared tail for an own block by then, filled or not."""
    parent = house.open(PAST)
    house.engine.fork(parent)
    score = house.submit(parent, LONG, want=DRAW, keep=False)
    for _ in range(batches):
        house.engine.run_once()
    child = house.engine.fork(parent)[0].id
    early = house.engine.fork(parent, at=18)[0].id
    assert house.append(child, [8], want=DRAW).outputs["next_token"] == [next_token([*PAST, 8])]
    assert house.append(early, [8], want=DRAW).outputs["next_token"] == [next_token([*PAST[:18], 8])]
    assert score.future.result(0).outputs["next_token"] == [next_token(PAST + LONG)]


def test_a_fork_taken_before_the_tail_is_copied_reads_no_empty_block(house: House) -> None:
    """The batch with the copy failed, and its appends are about to be tried alone."""
    parent, mate = house.open(PAST), house.open([1])
    house.engine.fork(parent)
    house.runner.broken = RuntimeError("before anything was copied")
    append = house.submit(parent, [7])
    house.submit(mate, [2])
    house.engine.run_once()
    child = house.engine.fork(parent)[0].id
    house.engine.run_once()
    house.run()
    assert isinstance(append.future.exception(0), ModelFailed)
    house.runner.broken = None
    assert house.append(child, [8], want=DRAW).outputs["next_token"] == [next_token([*PAST, 8])]


def test_deleting_ends_it_and_frees_all(house: House) -> None:
    parent = house.open(PAST)
    child = house.engine.fork(parent)[0].id
    score = house.submit(child, LONG, keep=False)
    house.engine.run_once()
    house.engine.delete_session(child)
    house.engine.check()
    house.run()
    assert isinstance(score.future.exception(0), SessionGone)
    assert house.engine.capacity().models[0].used == 2


def test_it_waits_for_blocks_as_any_append(house: House) -> None:
    hog, session = house.open([1] * 190), house.open([1] * 100)
    before = state(house, hog, session)
    score = house.submit(session, [2] * 60, keep=False)
    house.run()
    house.clock.now += 31
    house.run()
    assert isinstance(score.future.exception(0), PoolExhausted)
    after = state(house, hog, session)
    assert after[1] == before[1]


def test_ragged_rows_and_rows_that_bring_nothing(house: House) -> None:
    session = house.open(batch_size=3)
    house.append(session, [1, 2], [3, 0], [4, 5], batch_valid_length=[2, 1, 2])
    before = state(house, session)
    score = house.append(session, [6, 7], [8, 0], [0, 0], batch_valid_length=[4, 2, 2], want=DRAW, keep=False)
    assert score.outputs["next_token"] == [next_token([1, 2, 6, 7]), next_token([3, 8]), None]
    assert (score.past_length, score.valid_length) == ([2, 1, 2], [4, 2, 2])
    assert state(house, session) == before


def test_an_attention_layer_scores(house: House) -> None:
    session = house.attention_session()
    house.ask(session, [[1, 2]], [[3, 4]])
    before = house.engine.session(session)
    scored = house.ask(session, [[5]], [[6]], keep=False)
    assert scored.outputs["attn_out"][0, 0, 0] == 5 + 3 + 4 + 6
    assert (scored.past_length, scored.valid_length, scored.version) == ([2], [3], 1)
    asked = house.ask(session, [[5]], None, keep=False)
    assert (asked.outputs["attn_out"][0, 0, 0], asked.valid_length) == (5 + 3 + 4, [2])
    assert house.engine.session(session) == before


def test_a_cancelled_one_that_has_not_run_is_dropped(house: House) -> None:
    session = house.open([1])
    before = state(house, session)
    score: Append = house.submit(session, [2], keep=False)
    assert score.future.cancel()
    ran = len(house.runner.batches)
    house.run()
    assert (state(house, session), len(house.runner.batches)) == (before, ran)
