"""The Triton kernels on a CPU, by Triton's interpreter, against plain float64 arithmetic and the slow truth.

The interpreter runs each program with numpy, so shapes are small and splits smaller than a GPU's. It sees neither races
nor layouts: `benchmarks/gpu_check.py` runs the same cases on a device. It does not multiply bfloat16 (it reads it as
integers), so with such a past products are in float32 here.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.base import Scoring
from engine.attention.cuda import TritonBackend, Tuning
from engine.attention.sdpa import SdpaBackend
from tests.engine.attention_cases import Case, World, make
from tests.engine.triton_cases import BRAIN, CASES, HALF, SMALL, check, one_row
from tests.pace import slow_but

WIDE = replace(SMALL, wide=True)


FAST = {
    "ragged",
    "steps",
    "nothing",
    "rows_of_no_query",
    "half_rotated",
    "masked_and_causal",
    "extra_keys_masked",
    "queries_alone",
    "more_keys_than_queries",
    "float16",
    "bfloat16",
}


@pytest.mark.parametrize("name", slow_but(CASES, FAST))
def test_case(name: str) -> None:
    case = CASES[name]
    check(case, WIDE if case.cache_dtype == BRAIN else SMALL)


@settings(max_examples=6, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from([0, 1, 15, 16, 31, 32, 33, 65]), st.integers(0, 9)), max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([3, 8, 16, 20]),
    block_size=st.sampled_from([16, 8, 5]),
    dtype=st.sampled_from([torch.float32, HALF]),
    causal=st.booleans(),
    biased=st.booleans(),
    extras=st.sampled_from([0, 0, 2]),
    rotary=st.sampled_from([0.0, 0.5, 1.0]),
    tuning=st.sampled_from([SMALL, Tuning(split=64, tile=32, lanes=32), Tuning(split=16, tile=16, lanes=16)]),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_batch(
    rows: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    causal: bool,
    biased: bool,
    extras: int,
    rotary: float,
    tuning: Tuning,
    transposed: bool,
    seed: int,
) -> None:
    case = Case(
        tuple(past for past, _ in rows),
        tuple(new for _, new in rows),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=dtype,
        causal=causal,
        rotary_dim=int(head_dim * rotary) // 2 * 2,
        biased=biased and bool(rows),
        extras=extras,
        seed=seed,
    )
    check(case, tuning, transposed=transposed)


def one_term(w: World) -> World:
    """With keys and values of which each sum in a product has but one term that is not zero.

    numpy's product of matrices rounds a line differently at another place of the tile, a GPU's does not.
    """
    size = w.case.block_size
    assert w.case.head_dim == size == SMALL.tile
    own = torch.eye(size, dtype=torch.bool)
    offsets = w.inputs.positions % size
    return replace(
        w,
        k=w.k.where(own[offsets][:, None], 0),
        v=w.v.where(own[offsets][:, None], 0),
        k_blocks=w.k_blocks.where(own | w.k_blocks.isnan(), 0),
        v_blocks=w.v_blocks.where(own | w.v_blocks.isnan(), 0),
    )


def test_a_rows_bits_depend_on_no_company_and_on_no_width_of_the_table() -> None:
    w = make(Case((0, 31, 33, 110), (5, 1, 9, 1), heads=4, dtype=HALF, cache_dtype=HALF, rotary_dim=16))
    backend = TritonBackend(SMALL)
    together = w.attend(backend)
    starts = w.inputs.query_start.tolist()
    for row in range(4):
        assert torch.equal(one_row(w, row).attend(backend), together[starts[row] : starts[row + 1]])


@pytest.mark.parametrize("chunks", [(1,) * 12 + (18,), (7, 1, 10, 12), (29, 1)])
def test_a_positions_bits_depend_on_no_chunk(chunks: tuple[int, ...]) -> None:
    w = one_term(make(Case((50,), (30,), dtype=HALF, cache_dtype=HALF, heads=2, kv_heads=1)))
    backend = TritonBackend(SMALL)
    whole = w.attend(backend)
    pools, at = (w.k_blocks.clone(), w.v_blocks.clone()), 0
    for size in chunks:
        part = slice(at, at + size)
        inputs = replace(
            w.inputs,
            query_start=torch.tensor([0, size], dtype=torch.int32),
            past_length=torch.tensor([50 + at], dtype=torch.int32),
            present_length=torch.tensor([50 + at + size], dtype=torch.int32),
            positions=w.inputs.positions[part],
            slots=w.inputs.slots[part],
        )
        got = backend.attend(w.q[part], w.k[part], w.v[part], *pools, inputs, w.rotary, w.scoring)
        assert torch.equal(got, whole[part])
        at += size


@pytest.mark.slow
def test_blocks_beyond_two_to_the_31_numbers_are_found() -> None:
    """In pools of 4 GiB each, of which nothing but the last blocks is ever touched."""
    w = make(Case((20, 5), (1, 4), heads=2, kv_heads=1, dtype=HALF, cache_dtype=HALF, rotary_dim=16))
    far = (1 << 31) // (16 * 16)
    pools = [torch.empty(far + len(w.k_blocks), 1, 16, 16, dtype=HALF) for _ in range(2)]
    for pool, blocks in zip(pools, (w.k_blocks, w.v_blocks), strict=True):
        pool[far:] = blocks
    backend = TritonBackend(SMALL)
    inputs = replace(w.inputs, block_table=w.inputs.block_table + far, slots=w.inputs.slots + far * 16)
    out = backend.attend(w.q, w.k, w.v, pools[0], pools[1], inputs, w.rotary, w.scoring)
    expected, keys, values = w.run(backend)
    assert torch.equal(out, expected)
    for pool, blocks in zip(pools, (keys, values), strict=True):
        assert torch.equal(pool[far:].nan_to_num(7), blocks.nan_to_num(7))
    far_away = backend.probabilities(w.q, pools[0], inputs, w.rotary, w.scoring)
    near = backend.probabilities(w.q, keys, w.inputs, w.rotary, w.scoring)
    assert all(torch.equal(one, other) for one, other in zip(far_away, near, strict=True))


def test_steps_that_the_host_knows_as_such_give_the_same_bits() -> None:
    w = make(CASES["steps"])
    known = replace(w, inputs=replace(w.inputs, steps=True))
    backend = TritonBackend(SMALL)
    assert torch.equal(known.attend(backend), w.attend(backend))


def test_rows_that_are_not_there_get_zeros() -> None:
    """As a batch is padded for a graph: no present, the null block's slots."""
    w = make(Case((40, 0), (1, 1), dtype=HALF, cache_dtype=HALF, rotary_dim=16))
    lengths = torch.tensor([41, 0], dtype=torch.int32)
    slots = torch.tensor([int(w.inputs.slots[0]), 0])
    padded = replace(w, inputs=replace(w.inputs, present_length=lengths, slots=slots, steps=True))
    backend = TritonBackend(SMALL)
    out = padded.attend(backend)
    assert torch.equal(out[0], w.attend(backend)[0])
    assert not out[1].any()


@pytest.mark.parametrize("softmax_dtype", [torch.float16, torch.float64])
def test_what_the_kernels_do_not_do_is_done_slowly(softmax_dtype: torch.dtype) -> None:
    w = make(CASES["ragged"])
    w = replace(w, scoring=Scoring(w.scoring.scale, softmax_dtype=softmax_dtype))
    backend, truth = TritonBackend(SMALL), SdpaBackend()
    assert torch.equal(w.attend(backend), w.attend(truth))
    keys = w.run(truth)[1]
    expected = truth.probabilities(w.q, keys, w.inputs, None, w.scoring)
    for got, part in zip(backend.probabilities(w.q, keys, w.inputs, None, w.scoring), expected, strict=True):
        assert torch.equal(got, part)


def test_rotary_needs_a_position_for_each_key() -> None:
    w = make(replace(CASES["queries_alone"], rotary_dim=0))
    rotary = make(CASES["rotated"]).rotary
    with pytest.raises(ValueError, match="S must be T"):
        replace(w, rotary=rotary).attend(TritonBackend(SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, HALF, BRAIN])
@pytest.mark.parametrize("size", [1, 48, 300])
def test_norm_and_gate(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x, residual = (torch.randn(2, 5, size, generator=generator).to(dtype) for _ in range(2))
    weight, backend, truth = torch.rand(size, generator=generator).to(dtype), TritonBackend(SMALL), SdpaBackend()
    # The interpreter cuts bfloat16 off instead of rounding it: one place more.
    rtol = {torch.float32: 1e-5, HALF: 1e-3, BRAIN: 1.6e-2}[dtype]
    for added in (None, residual):
        for got, expected in zip(
            backend.rms_norm(x, weight, 1e-5, added), truth.rms_norm(x, weight, 1e-5, added), strict=True
        ):
            assert got.dtype == dtype
            torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-5)
    wide = torch.cat([x, residual], -1)
    torch.testing.assert_close(backend.silu_gate(wide), truth.silu_gate(wide), rtol=rtol, atol=1e-5)


def test_a_split_is_whole_tiles() -> None:
    with pytest.raises(ValueError, match="multiple of tile"):
        Tuning(split=100, tile=64)
