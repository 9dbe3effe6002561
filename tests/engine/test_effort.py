"""What a call says that it computed, reused, and shares."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine.blocks import BlockPool
from tests.engine.test_engine import DRAW, House

PAST = [5] * 37  # two whole blocks and a part of a third
Told = tuple[list[int], list[int], list[int]]


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.engine.check()
    assert house.runner.faults == []


def told(result: Any) -> Told:
    return result.effort.computed, result.effort.reused, result.effort.shared


def test_an_append_computes_what_it_brings_and_reuses_the_rest(house: House) -> None:
    session = house.open()
    assert told(house.append(session, PAST)) == ([37], [0], [0])
    assert told(house.append(session, [1] * 70)) == ([70], [37], [0]), "in chunks"
    assert told(house.append(session, [1], step=True)) == ([1], [107], [0])
    assert told(house.append(session, [1] * 9, keep=False)) == ([9], [108], [0])


def test_padding_is_not_computed(house: House) -> None:
    session = house.open(batch_size=3)
    house.append(session, [1, 2], [3, 0], [0, 0], batch_valid_length=[2, 1, 0])
    assert told(house.append(session, [6, 7], [0, 0], [4, 5], batch_valid_length=[3, 1, 2])) == (
        [1, 0, 2],
        [2, 1, 0],
        [0, 0, 0],
    )


def test_what_a_fork_shares_is_counted_until_it_is_left(house: House) -> None:
    parent = house.open(PAST)
    child = house.engine.fork(parent)[0].id
    early = house.engine.fork(parent, at=20)[0].id
    assert told(house.append(child, [1])) == ([1], [37], [37])
    assert told(house.append(child, [1])) == ([1], [38], [32]), "its tail is its own now"
    assert told(house.append(early, [1])) == ([1], [20], [20])
    assert told(house.append(parent, [1])) == ([1], [37], [32])
    assert house.engine.session(parent).shared_blocks == 2
    house.engine.delete_session(child)
    assert told(house.append(parent, [1])) == ([1], [38], [16])
    house.engine.delete_session(early)
    assert told(house.append(parent, [1])) == ([1], [39], [0])


def test_a_score_tells_the_same_each_time(house: House) -> None:
    parent = house.open(PAST)
    house.engine.fork(parent)
    assert [told(house.append(parent, [1, 2], keep=False)) for _ in range(2)] == [([2], [37], [37])] * 2


def test_a_generation_computes_its_tokens(house: House) -> None:
    session = house.open(PAST)
    assert told(house.generate(session, 5)) == ([5], [37], [0])


def test_a_position_that_is_computed_again_is_not_reused(house: House) -> None:
    session = house.open(PAST)
    house.truncate(session, 20)
    assert told(house.generate(session, 3)) == ([4], [19], [0])
    child = house.engine.fork(session, at=5)[0].id
    assert told(house.generate(child, 1)) == ([2], [4], [4])
    assert house.runner.replayed == 2


def test_queries_alone_compute_no_position(house: House) -> None:
    session = house.attention_session()
    assert told(house.ask(session, [[1, 2]], [[3, 4]])) == ([2], [0], [0])
    assert told(house.ask(session, [[1, 2, 3]], None)) == ([0], [2], [0])
    assert told(house.ask(session, None, [[5]])) == ([1], [2], [0])


def test_together_they_are_the_length(house: House) -> None:
    session = house.open([1] * 30, batch_size=1)
    house.engine.fork(session, at=17)
    for result in (
        house.append(session, [1] * 50, want=DRAW),
        house.append(session, [1] * 3, keep=False),
        house.generate(session, 4),
    ):
        assert [c + r for c, r in zip(*told(result)[:2], strict=True)] == result.valid_length


def test_the_shared_prefix_of_a_table() -> None:
    pool = BlockPool(9)
    table = pool.take(5)
    assert table is not None
    for shared in range(6):
        pool.share(table[:shared])
        assert pool.shared_prefix(table) == shared
        assert pool.shared_prefix(table[:2]) == min(shared, 2)
        pool.release(table[:shared])
    assert pool.shared_prefix([]) == 0
