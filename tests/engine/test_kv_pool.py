"""Pasts in and out of blocks, against loops over single slots."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kv_pool import KVPool
from engine.specs import KVSpec

LAYERS, HEADS, WIDTH = 2, 3, 5
lengths_of_rows = st.lists(st.integers(0, 13), min_size=1, max_size=4)


def filled(block_size: int, dtype: str = "float32", transposed: bool = True) -> KVPool:
    """Every slot of every block holds its own numbers, one of them NaN."""
    pool = KVPool(KVSpec(LAYERS, HEADS, WIDTH, dtype), 60, block_size, "cpu", transposed)
    assert pool.k.is_contiguous() == (transposed or block_size == 1)
    for tensor in (pool.k, pool.v):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    pool.k[:, 0, 0, 0, 0] = torch.nan  # the null block holds what padding left there
    return pool


def layout(lengths: list[int], block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tables of distinct blocks in any order, padded with the null block, and the valid slots."""
    used = [-(-length // block_size) for length in lengths]
    drawn = iter(np.random.default_rng(seed).permutation(np.arange(1, 60)).tolist())
    tables = [[next(drawn) for _ in range(count)] + [0] * (max(used) - count) for count in used]
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.tensor(tables, dtype=torch.int64).view(len(lengths), max(used)), valid


@settings(deadline=None)
@given(
    lengths=lengths_of_rows, block_size=st.sampled_from([1, 4, 16]), seed=st.integers(0, 99), transposed=st.booleans()
)
def test_reading_is_slot_by_slot(lengths: list[int], block_size: int, seed: int, transposed: bool) -> None:
    pool = filled(block_size, transposed=transposed)
    tables, valid = layout(lengths, block_size, seed)
    for layer in range(LAYERS):
        k, v = pool.read(layer, tables, valid)
        assert (k.shape, v.shape) == (
            (len(lengths), HEADS, WIDTH, max(lengths)),
            (len(lengths), HEADS, max(lengths), WIDTH),
        )
        for row, length in enumerate(lengths):
            for position in range(length):
                block, offset = int(tables[row, position // block_size]), position % block_size
                assert torch.equal(k[row, :, :, position], pool.k[layer, block, :, :, offset])
                assert torch.equal(v[row, :, position], pool.v[layer, block, :, offset])
            assert not k[row, :, :, length:].any()
            assert not v[row, :, length:].any()


@settings(deadline=None)
@given(
    lengths=lengths_of_rows, block_size=st.sampled_from([1, 4, 16]), seed=st.integers(0, 99), transposed=st.booleans()
)
def test_writing_then_reading_gives_what_was_written_and_touches_no_other_block(
    lengths: list[int], block_size: int, seed: int, transposed: bool
) -> None:
    pool, before = filled(block_size, transposed=transposed), filled(block_size)
    tables, valid = layout(lengths, block_size, seed)
    k = torch.randn(len(lengths), HEADS, WIDTH, max(lengths))
    v = torch.randn(len(lengths), HEADS, max(lengths), WIDTH)
    k[~valid[:, None, None].expand_as(k)] = torch.nan  # what is not valid must not matter
    pool.write(1, tables, valid, k, v)
    got_k, got_v = pool.read(1, tables, valid)
    assert torch.equal(got_k, k.nan_to_num())
    assert torch.equal(got_v, v * valid[:, None, :, None])
    others = [block for block in range(60) if block == 0 or block not in tables]
    for now, then in ((pool.k, before.k), (pool.v, before.v)):
        assert torch.equal(now[0].nan_to_num(), then[0].nan_to_num())
        assert torch.equal(now[1, others].nan_to_num(), then[1, others].nan_to_num())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_of_the_pool_s_dtype_come_back_exactly(dtype: str) -> None:
    source, target = filled(4, dtype), KVPool(KVSpec(LAYERS, HEADS, WIDTH, dtype), 60, 4, "cpu")
    tables, valid = layout([13, 6], 4, 1)
    k, v = source.read(0, tables, valid)
    target.write(0, tables, valid, k.float(), v.float())
    assert all(map(torch.equal, target.read(0, tables, valid), (k, v)))


def test_blocks_of_either_layout_are_copied_and_zeroed_alike() -> None:
    pools = filled(4), filled(4, transposed=False)
    for pool in pools:
        pool.copy([(5, 7), (6, 8)])
        pool.zero([5, 9])
    for ours, other in zip((pools[0].k, pools[0].v), (pools[1].k, pools[1].v), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(pools[1].k[:, 7], filled(4).k[:, 5])
    assert not pools[1].k[:, [5, 9]].any()
