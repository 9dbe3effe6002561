import pytest

from engine.blocks import BlockPool, blocks_for


def test_takes_low_ids_first_and_reuses_the_last_freed() -> None:
    pool = BlockPool(6)
    assert pool.take(3) == [1, 2, 3]
    assert pool.release([2]) == 1
    assert pool.take(2) == [2, 4]
    assert repr(pool) == "<BlockPool 6: 4 used, 1 free, 1 null>"


def test_none_means_not_now_and_takes_nothing() -> None:
    pool = BlockPool(4)
    assert pool.take(4) is None
    assert pool.free == 3
    assert pool.take(3) == [1, 2, 3]
    assert pool.take(0) == []
    assert pool.take(1) is None


def test_a_shared_block_comes_free_with_its_last_holder() -> None:
    pool = BlockPool(4)
    blocks = pool.take(2)
    assert blocks == [1, 2]
    pool.share([1])
    assert pool.is_shared(1)
    assert not pool.is_shared(2)
    assert pool.shared == 1
    assert pool.release([1, 2]) == 1
    assert pool.release([1]) == 1
    assert pool.free == 3
    pool.check([])


def test_misuse_is_an_error_and_not_a_wrong_count() -> None:
    pool = BlockPool(4)
    pool.take(1)
    pool.release([1])
    with pytest.raises(RuntimeError, match="released more often"):
        pool.release([1])
    with pytest.raises(RuntimeError, match="is free and cannot be shared"):
        pool.share([2])
    with pytest.raises(ValueError, match="null block and at least one more"):
        BlockPool(1)


def test_check_finds_what_the_tables_do_not_say() -> None:
    pool = BlockPool(5)
    pool.take(2)
    pool.check([("", [1]), ("", [2])])
    with pytest.raises(RuntimeError, match="block 2 has 1 holders, 0 tables"):
        pool.check([("", [1])])
    with pytest.raises(RuntimeError, match="block 1 has 1 holders, 2 tables"):
        pool.check([("", [1, 2]), ("", [1])])
    with pytest.raises(RuntimeError, match="null block"):
        pool.check([("", [0, 1, 2])])


@pytest.mark.parametrize(("length", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for(length: int, blocks: int) -> None:
    assert blocks_for(length, 16) == blocks
