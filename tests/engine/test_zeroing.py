"""A freed block is zeroed before anyone gets it, after the pass that may still write to it, a bounded part a turn."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Truncate
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import SessionGone
from engine.kv_pool import KVPool
from engine.specs import KVSpec
from tests.engine.houses import Decoders
from tests.engine.models import Served, serve_checkpoint
from tests.tiny import save_tiny_decoder

# The pool of ids


def test_a_freed_block_is_handed_out_only_after_it_is_zeroed() -> None:
    pool = BlockPool(5, zero=True)
    first = pool.take(4)
    assert first == [1, 2, 3, 4]
    pool.release([1, 3])
    assert (pool.free, pool.available(""), pool.take(1)) == (2, 2, None)
    assert pool.to_zero(1) == [3]
    assert pool.take(1) is None  # not while it is being zeroed, either
    pool.zeroed()
    assert pool.take(1) == [3]
    assert pool.soiled
    assert pool.to_zero(9) == [1]
    pool.zeroed()
    assert not pool.soiled
    pool.check([("", [2, 3, 4])])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_nobody_gets_what_has_not_been_zeroed(moves: list[tuple[int, int]]) -> None:
    pool, held, written = BlockPool(12, zero=True), list[int](), set[int]()
    for what, count in moves:
        if what == 0:
            taken = pool.take(count) or []
            assert not written & set(taken)
            held += taken
            written |= set(taken)
        elif what == 1:
            pool.release(held[:count])
            del held[:count]
        elif what == 2 and count:
            written -= set(pool.to_zero(count))
            pool.zeroed()
        pool.check([("", held)])
        assert pool.free + len(held) == 11


# The tensors


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_every_layer_of_a_block_is_zeroed_and_no_other(dtype: str) -> None:
    pool = KVPool(KVSpec(3, 2, 4, dtype), 6, 8, "cpu")
    pool.k.fill_(1)
    pool.v.fill_(float("nan"))
    pool.zero([0, 2, 5])
    for block in range(6):
        zero = block in (0, 2, 5)
        assert bool((pool.k[:, block] == 0).all()) == zero
        assert bool((pool.v[:, block] == 0).all()) == zero


# The engine


def test_delete_zeroes_what_it_freed_and_the_null_block() -> None:
    house = Decoders()
    keeps = house.open(positions=8)
    session = house.open(positions=12)
    house.engine.delete_session(session)
    house.run()
    assert house.runner.zeroed == [[0, 3, 4, 5]]
    assert [house.runner.memory.is_zero(block) for block in range(1, 6)] == [False, False, True, True, True]
    assert house.append(keeps, 1).valid_length == [9]


@pytest.mark.parametrize("how", ["delete", "truncate", "expire", "evict", "fail", "score"])
def test_whatever_frees_a_block_has_it_zeroed(how: str) -> None:
    house = Decoders(blocks=6, evict="lru")
    session = house.open(positions=4, ttl_seconds=10)
    rest = house.open(positions=12)
    if how == "delete":
        house.engine.delete_session(session)
    elif how == "truncate":
        house.engine.submit(Truncate(session, 0))
    elif how == "expire":
        house.later(10)
    elif how == "evict":
        house.append(rest, 9)
    elif how == "fail":
        house.runner.poison = 7
        house.submit(session, 8)
    else:
        house.submit(session, 8, keep=False)
    house.run()
    written = [block for block in range(1, 7) if not house.runner.memory.is_zero(block)]
    assert len(written) == house.engine.capacity().models[0].used
    assert house.runner.zeroed


def test_one_turn_zeroes_a_bounded_part_and_the_rest_comes_in_the_next() -> None:
    block_bytes = Decoders().engine.capacity().models[0].block_bytes
    house = Decoders(zero_bytes=3 * block_bytes)
    session = house.open(positions=40)
    house.engine.delete_session(session)
    appends = house.submit(house.open(), 80)  # 20 blocks: 14 are clean
    turns = 0
    while house.engine.run_once():
        turns += 1
        house.check()
    assert [len(blocks) - 1 for blocks in house.runner.zeroed] == [3, 3, 3, 1]
    assert appends.future.result(0).valid_length == [80]


def test_off_means_not_at_all() -> None:
    house = Decoders(zero_freed=False)
    house.engine.delete_session(house.open(positions=12))
    house.run()
    assert house.runner.zeroed == []
    assert house.open(positions=12)


def test_a_delete_during_the_pass_zeroes_after_the_pass() -> None:
    house = Decoders()
    session = house.open(positions=4)
    append = house.submit(session, 8)
    house.runner.before_run = lambda batch: house.engine.delete_session(session)
    house.run()
    with pytest.raises(SessionGone, match="deleted"):
        append.future.result(0)
    assert house.free() == 24
    assert all(house.runner.memory.is_zero(block) for block in range(25))  # the pass wrote to them after the delete


def test_waiting_returns_while_there_is_something_to_zero() -> None:
    house = Decoders()
    house.engine.delete_session(house.open(positions=4))
    house.engine.run_once()
    house.engine.delete_session(house.open(positions=4))
    house.engine.wait(timeout=60)  # the test's own limit is the assertion
    house.run()


# The real runner


def slots(served: Served, block: int) -> torch.Tensor:
    """All that a block holds, as an export reads it."""
    past = served.runner.read_past([[block]], [16])
    return torch.cat([torch.from_numpy(array).flatten() for array in past.values()])


@pytest.mark.parametrize("backend", ["sdpa", "cpu"])
def test_nothing_of_a_deleted_session_is_left_on_the_device(tmp_path: Path, backend: str) -> None:
    served = serve_checkpoint(save_tiny_decoder(tmp_path), backend_name=backend, blocks=6)
    others = served.open()
    served.logits(others, [7] * 20)
    session = served.open()
    served.logits(session, list(range(5, 45)))
    before = slots(served, 1)
    assert all(slots(served, block).any() for block in range(1, 6))
    served.engine.delete_session(session)
    while served.engine.run_once():
        served.engine.check()
    for block in (0, 3, 4, 5):
        assert not slots(served, block).any()
    assert torch.equal(slots(served, 1), before)


@pytest.mark.parametrize("zero", [True, False])
def test_outputs_do_not_depend_on_who_had_the_blocks_before(tmp_path: Path, zero: bool) -> None:
    """To the bit, and by masks alone: with zeroing off, too."""
    path = save_tiny_decoder(tmp_path)

    def outputs(canary: bool) -> torch.Tensor:
        served = serve_checkpoint(path, blocks=6)
        engine = Engine([served.runner], EngineConfig(zero_freed=zero))
        served.engine = engine
        if canary:
            for tokens in ([9] * 80, list(range(60, 140))):
                session = served.open()
                served.logits(session, tokens)
                engine.delete_session(session)
        session = served.open()
        first = served.logits(session, list(range(20, 43)))
        (child,) = engine.fork(session, at=18)
        return torch.cat([first, served.logits(child.id, [3, 4, 5]), served.logits(session, [3])])

    assert torch.equal(outputs(canary=True), outputs(canary=False))
