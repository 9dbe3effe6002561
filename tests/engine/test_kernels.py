"""The native kernels and the slow truth against plain float64 arithmetic, and the kernels against themselves: a query's
bits depend on no company.

Tolerances: a result in dtype D may be one rounding of D from the truth, after sums in float32 over caches whose
contents the reference reads exactly as they were stored. So: a few units of D's last place, relative to values near 1.
"""

import ctypes
import itertools
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.base import AttentionInputs, Backend, Scoring
from engine.attention.cpu import CpuBackend
from engine.attention.sdpa import SdpaBackend
from engine.kernels import build
from tests.engine.attention_cases import Case, World, make, reference, rotated

CACHE = Path.home() / ".cache" / "keypast"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PASTS = (0, 1, 15, 16, 255, 256, 257, 511, 512, 513, 700)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # 2^-10 and 2^-7 doubled; fp32 sums
CPU, SDPA = CpuBackend(CACHE), SdpaBackend()
BACKENDS: list[Backend] = [CPU, SDPA]
# One more is avx512 with other products in linears (see test_packing).
ISAS: list[str] = [isa for isa in torch.ops.keypast.isas() if isa != "avx512vnni"]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), torch.ops.keypast.isa()
    yield
    torch.set_num_threads(threads)
    torch.ops.keypast.force_isa(isa)


def check(case: Case) -> None:
    w = make(case)
    truth, tolerance = reference(w), TOLERANCE[case.dtype]
    out, *pools = w.run(CPU)
    slow, *slow_pools = w.run(SDPA)
    assert out.dtype == slow.dtype == case.dtype
    torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slow.double(), truth, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pools, slow_pools, rtol=0, atol=0, equal_nan=True)


# ---- attention against the reference ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_types(isa: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    torch.ops.keypast.force_isa(isa)
    case = Case(
        (0, 255, 257, 511, 512, 513, 3), (17, 1, 1, 2, 1, 1, 40), dtype=dtype, cache_dtype=cache_dtype, rotary_dim=16
    )
    check(case)
    check(replace(case, head_dim=24, rotary_dim=8))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 16, 24, 64, 80, 128])
def test_head_dims(isa: str, head_dim: int) -> None:
    torch.ops.keypast.force_isa(isa)
    for cache_dtype in (torch.float16, torch.float32):
        case = Case((20, 0, 256), (1, 9, 33), head_dim=head_dim, cache_dtype=cache_dtype)
        check(replace(case, rotary_dim=head_dim // 2 * 2))
        check(replace(case, block_size=7))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", range(1, 9))
def test_groups(isa: str, group: int) -> None:
    torch.ops.keypast.force_isa(isa)
    check(Case((30, 300), (1, 19), heads=2 * group, head_dim=32, cache_dtype=torch.bfloat16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block_size", [16, 32, 7])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_masks(isa: str, block_size: int, causal: bool, biased: bool) -> None:
    torch.ops.keypast.force_isa(isa)
    check(
        Case((700, 500, 0), (3, 20, 30), block_size=block_size, causal=causal, biased=biased, cache_dtype=torch.float16)
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(PASTS), st.integers(0, 40), st.integers(0, 40)), max_size=5),
    apart=st.booleans(),
    extras=st.sampled_from([0, 0, 1, 2, 17]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([1, 3, 8, 16, 24, 64, 80, 128]),
    block_size=st.sampled_from([16, 32, 5]),
    dtype=st.sampled_from(DTYPES),
    cache_dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    biased=st.booleans(),
    rotary=st.sampled_from([0.0, 0.5, 1.0]),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 1000),
)
def test_any_batch(
    rows: list[tuple[int, int, int]],
    apart: bool,
    extras: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    causal: bool,
    biased: bool,
    rotary: float,
    isa: str,
    seed: int,
) -> None:
    torch.ops.keypast.force_isa(isa)
    past, new = tuple(p for p, _, _ in rows), tuple(n for _, n, _ in rows)
    check(
        Case(
            past=past,
            new=new,
            heads=kv_heads * group,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            cache_dtype=cache_dtype,
            causal=causal,
            rotary_dim=0 if apart else int(head_dim * rotary) // 2 * 2,
            biased=biased and bool(rows),
            keys=tuple(m for _, _, m in rows) if apart else None,
            extras=extras,
            seed=seed,
        )
    )


# ---- the layer's own keys ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block_size", [16, 32, 7])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("extras", [1, 2, 600])  # one chunk of them, and two
def test_extra_keys(isa: str, block_size: int, causal: bool, biased: bool, extras: int) -> None:
    """Ragged rows, partial blocks, a row with no key of its own, first queries that see nothing else."""
    torch.ops.keypast.force_isa(isa)
    case = Case(
        (500, 0, 700, 0, 16),
        (20, 3, 1, 30, 0),
        keys=(20, 0, 1, 30, 0),
        block_size=block_size,
        causal=causal,
        biased=biased,
        extras=extras,
        cache_dtype=torch.float16,
    )
    check(case)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 24, 64, 128])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_extra_keys_of_any_heads(isa: str, head_dim: int, group: int) -> None:
    torch.ops.keypast.force_isa(isa)
    for dtype, cache_dtype in zip(DTYPES, DTYPES[1:] + DTYPES[:1], strict=True):
        check(
            Case(
                (0, 513, 30),
                (9, 1, 33),
                heads=3 * group,
                kv_heads=3,
                head_dim=head_dim,
                dtype=dtype,
                cache_dtype=cache_dtype,
                rotary_dim=head_dim // 2 * 2,
                extras=2,
            )
        )


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("hidden", ["masked", "none"])
def test_one_extra_key_is_all_that_a_blind_query_sees(backend: Backend, hidden: str) -> None:
    past, keys = ((40,), (3,)) if hidden == "masked" else ((0,), (0,))
    w = make(Case(past, (3,), keys=keys, biased=True, extras=1, dtype=torch.float16))
    assert w.inputs.bias is not None
    assert w.scoring.extra_v is not None
    w.inputs.bias.fill_(-torch.inf)
    only = w.scoring.extra_v[0].repeat_interleave(3, 0).flatten().half()  # 6 heads read 2
    assert torch.equal(w.attend(backend), only.expand(3, -1))


def test_an_empty_list_of_extra_keys_is_none() -> None:
    w = make(Case((40, 0), (3, 20)))
    empty = replace(w, scoring=Scoring(w.scoring.scale, torch.zeros(0, 2, 16), torch.zeros(0, 2, 16)))
    assert torch.equal(empty.attend(CPU), w.attend(CPU))


@pytest.mark.parametrize(
    ("extra_k", "extra_v"),
    [
        (torch.zeros(1, 2, 16), None),
        (None, torch.zeros(1, 2, 16)),
        (torch.zeros(1, 2, 16), torch.zeros(2, 2, 16)),
        (torch.zeros(1, 6, 16), torch.zeros(1, 6, 16)),
        (torch.zeros(2, 16), torch.zeros(2, 16)),
        (torch.zeros(1, 2, 16).half(), torch.zeros(1, 2, 16).half()),
        (torch.zeros(2, 2, 16)[::2].expand(2, -1, -1), torch.zeros(2, 2, 16)),
    ],
)
def test_refuses_extra_keys_of_another_form(extra_k: Tensor | None, extra_v: Tensor | None) -> None:
    w = make(Case((20,), (1,)))
    with pytest.raises(RuntimeError, match="keypast: extra_k and extra_v"):
        replace(w, scoring=Scoring(w.scoring.scale, extra_k, extra_v)).attend(CPU)


# ---- queries alone, keys alone ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("extras", [0, 1])
def test_as_many_new_keys_as_a_row_brings(isa: str, causal: bool, biased: bool, extras: int) -> None:
    torch.ops.keypast.force_isa(isa)
    case = Case(
        (20, 0, 513, 7, 0), (3, 40, 1, 0, 5), keys=(0, 5, 20, 9, 0), causal=causal, biased=biased, extras=extras
    )
    check(case)
    check(replace(case, block_size=7, dtype=torch.bfloat16, cache_dtype=torch.float16))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_queries_alone_read_the_past_and_write_nothing(backend: Backend) -> None:
    case = Case((20, 600), (3, 1), keys=(0, 0), causal=False, cache_dtype=torch.float16)
    w = make(case)
    out, *pools = w.run(backend)
    torch.testing.assert_close(out.double(), reference(w), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(pools, [w.k_blocks, w.v_blocks], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("keys", [(3, 0, 40), (0, 0, 0)])
def test_keys_alone_are_written(backend: Backend, keys: tuple[int, ...]) -> None:
    w = make(Case((20, 0, 0), (0, 0, 0), keys=keys, dtype=torch.float16, extras=1))
    out, k_blocks, v_blocks = w.run(backend)
    assert out.shape == (0, 6 * 16)
    assert out.dtype == torch.float16
    block, offset = w.inputs.slots // 16, w.inputs.slots % 16
    assert len(block) == sum(keys)
    assert torch.equal(k_blocks[block, :, :, offset], w.k.float())
    assert torch.equal(v_blocks[block, :, offset], w.v.float())
    written = torch.zeros(w.v_blocks.shape[0], 16, dtype=torch.bool)
    written[block, offset] = True
    untouched = v_blocks.transpose(1, 2)[~written], w.v_blocks.transpose(1, 2)[~written]
    torch.testing.assert_close(*untouched, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize(("queries", "keys"), [(1, 0), (0, 1), (1, 3), (3, 1)])
def test_rotary_needs_a_position_for_each_key(backend: Backend, queries: int, keys: int) -> None:
    w = make(Case((20,), (queries,), keys=(keys,)))
    rotary = make(Case((20,), (3,), rotary_dim=16)).rotary
    with pytest.raises((ValueError, RuntimeError), match="S must be T"):
        replace(w, rotary=rotary).attend(backend)


# ---- what the kernels leave to the slow truth ----


@pytest.mark.parametrize("softmax_dtype", [torch.float16, torch.bfloat16])
def test_a_softmax_in_half_precision(softmax_dtype: torch.dtype) -> None:
    w = make(Case((40, 0), (3, 20), heads=2, extras=1, causal=False))
    half = replace(w, scoring=replace(w.scoring, softmax_dtype=softmax_dtype))
    out, *pools = half.run(CPU)
    slow, *slow_pools = half.run(SDPA)
    assert torch.equal(out, slow)
    torch.testing.assert_close(pools, slow_pools, rtol=0, atol=0, equal_nan=True)
    assert w.scoring.extra_k is not None
    assert w.scoring.extra_v is not None
    scores = torch.einsum("nhd,khd->hnk", w.q[3:], torch.cat([w.k[3:], w.scoring.extra_k])) * w.scoring.scale
    weights = scores.to(softmax_dtype).softmax(-1)
    assert not torch.equal(weights.float(), scores.softmax(-1)), "the case tells the two apart"
    expected = torch.einsum("hnk,khd->nhd", weights.float(), torch.cat([w.v[3:], w.scoring.extra_v])).flatten(1)
    coarse = 2 * torch.finfo(softmax_dtype).eps
    torch.testing.assert_close(out[3:], expected, rtol=coarse / 8, atol=coarse / 8)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_dropout_of_probabilities(backend: Backend) -> None:
    """Sixteen equal probabilities, each either gone or doubled; the values tell which."""
    w = make(Case((0,), (16,), heads=2, causal=False))
    w.q.zero_()
    w.v.copy_(torch.eye(16)[:, None].expand(16, 2, 16))
    torch.manual_seed(0)
    out = replace(w, scoring=replace(w.scoring, dropout=0.5)).attend(backend)
    assert set(out.flatten().tolist()) == {0.0, 0.125}
    assert 0.3 < (out == 0).float().mean() < 0.7


# ---- what memory holds afterwards, and what is not read ----


def test_writes_the_pools() -> None:
    w = make(Case((5, 0), (2, 18), head_dim=24, rotary_dim=10, dtype=torch.bfloat16, cache_dtype=torch.float16))
    CPU.attend(w.q, w.k, w.v, w.k_blocks, w.v_blocks, w.inputs, w.rotary, w.scoring)
    block, offset = w.inputs.slots // 16, w.inputs.slots % 16
    rotated_k = rotated(w.k, w.inputs.positions, w.rotary).half()
    assert torch.equal(w.k_blocks[block, :, :, offset], rotated_k), "float32 rotation, then one rounding"
    assert torch.equal(w.v_blocks[block, :, offset], w.v.half())


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_padding_positions_write_to_the_null_block_and_give_zeros(backend: Backend) -> None:
    w = make(Case((40, 0), (1, 0)))
    w.inputs = replace(w.inputs, slots=torch.zeros(1, dtype=torch.int64), query_start=torch.zeros(3, dtype=torch.int32))
    backend.attend(w.q, w.k, w.v, w.k_blocks, w.v_blocks, w.inputs, None, w.scoring)
    assert torch.equal(w.k_blocks[0, :, :, 0], w.k[0])
    w.k_blocks[0].fill_(torch.nan)
    assert torch.equal(w.attend(backend), torch.zeros(1, w.q.shape[1] * w.q.shape[2]))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_empty_row_gives_zeros(backend: Backend) -> None:
    w = make(Case((0, 20), (1, 1)))
    w.inputs.present_length[0] = 0
    out = w.attend(backend)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].isfinite().all()


def test_masked_values_do_not_leak() -> None:
    """A NaN behind a -inf bias, or ahead of a causal query, must not be multiplied by zero."""
    w = make(Case((40,), (12,), heads=3, kv_heads=1, biased=True))
    assert w.inputs.bias is not None
    w.inputs.bias.view(12, 52)[:, 7] = -torch.inf
    clean = w.attend(CPU)
    block = w.inputs.block_table[0, 0]
    w.k_blocks[block, :, :, 7] = torch.nan
    w.v_blocks[block, :, 7] = torch.inf
    assert torch.equal(w.attend(CPU), clean)
    w.v[5] = torch.nan
    assert torch.equal(w.attend(CPU)[:5], clean[:5])


def test_overflow_stays_in_its_own_query() -> None:
    w = make(Case((40,), (3,), heads=1, kv_heads=1))
    clean = w.attend(CPU)
    w.q[1] = torch.nan
    out = w.attend(CPU)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], clean[::2])


# ---- a query's bits do not depend on its company ----

SAME = Case(
    (0,), (300,), heads=6, kv_heads=2, head_dim=64, dtype=torch.bfloat16, cache_dtype=torch.float16, rotary_dim=64
)


def in_chunks(w: World, sizes: list[int]) -> Tensor:
    """The same row, appended in pieces onto one cache."""
    k_blocks, v_blocks = w.k_blocks.clone(), w.v_blocks.clone()
    parts, start, past = [], 0, int(w.inputs.past_length[0])
    for n in sizes:
        new = slice(start, start + n)
        inputs = replace(
            w.inputs,
            query_start=torch.tensor([0, n], dtype=torch.int32),
            past_length=torch.tensor([past + start], dtype=torch.int32),
            present_length=torch.tensor([past + start + n], dtype=torch.int32),
            positions=w.inputs.positions[new],
            slots=w.inputs.slots[new],
        )
        parts.append(CPU.attend(w.q[new], w.k[new], w.v[new], k_blocks, v_blocks, inputs, w.rotary, w.scoring))
        start += n
    return torch.cat(parts)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block_size", [16, 32, 7])
@pytest.mark.parametrize(("heads", "head_dim"), [(6, 64), (2, 64), (14, 24)])
def test_prefill_equals_chunks_and_steps(isa: str, block_size: int, heads: int, head_dim: int) -> None:
    torch.ops.keypast.force_isa(isa)
    w = make(replace(SAME, heads=heads, head_dim=head_dim, rotary_dim=head_dim, block_size=block_size))
    whole = w.attend(CPU)
    assert torch.equal(in_chunks(w, [1] * 300), whole)
    for sizes in ([1, 299], [299, 1], [211, 1, 88], [212, 88], [213, 87], [3, 7, 100, 103, 1, 86]):  # 512 is a border
        assert torch.equal(in_chunks(w, sizes), whole), sizes


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 299), max_size=12),
    extras=st.sampled_from([0, 1, 2, 600]),
    isa=st.sampled_from(ISAS),
)
def test_prefill_equals_any_chunks(cuts: set[int], extras: int, isa: str) -> None:
    torch.ops.keypast.force_isa(isa)
    w = make(replace(SAME, extras=extras))
    edges = [0, *sorted(cuts), 300]
    assert torch.equal(in_chunks(w, [b - a for a, b in itertools.pairwise(edges)]), w.attend(CPU))


def alone(w: World, row: int) -> Tensor:
    inputs = w.inputs
    start, end = inputs.query_start[row : row + 2].tolist()
    own = replace(
        inputs,
        query_start=torch.tensor([0, end - start], dtype=torch.int32),
        past_length=inputs.past_length[row : row + 1],
        present_length=inputs.present_length[row : row + 1],
        block_table=inputs.block_table[row : row + 1],
        positions=inputs.positions[start:end],
        slots=inputs.slots[start:end],
    )
    return replace(w, inputs=own, q=w.q[start:end], k=w.k[start:end], v=w.v[start:end]).attend(CPU)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("extras", [0, 2])
def test_alone_equals_in_a_batch_on_any_threads(isa: str, causal: bool, extras: int) -> None:
    torch.ops.keypast.force_isa(isa)
    w = make(replace(SAME, past=(0, 700, 255, 1500, 16), new=(40, 1, 2, 1, 100), causal=causal, extras=extras))
    torch.set_num_threads(1)
    batch = w.attend(CPU)
    assert torch.equal(torch.cat([alone(w, row) for row in range(5)]), batch)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(w.attend(CPU), batch)
        assert torch.equal(torch.cat([alone(w, row) for row in range(5)]), batch)


def test_blocks_may_lie_anywhere() -> None:
    w = make(replace(SAME, past=(600,), new=(20,)))
    order = torch.randperm(w.k_blocks.shape[0])  # block b moves to order[b]
    moved = replace(
        w.inputs,
        block_table=order[w.inputs.block_table.long()].int(),
        slots=order[w.inputs.slots // 16] * 16 + w.inputs.slots % 16,
    )
    k_blocks, v_blocks = torch.empty_like(w.k_blocks), torch.empty_like(w.v_blocks)
    k_blocks[order], v_blocks[order] = w.k_blocks, w.v_blocks
    assert torch.equal(replace(w, inputs=moved, k_blocks=k_blocks, v_blocks=v_blocks).attend(CPU), w.attend(CPU))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_what_is_not_finite_is_seen_where_it_was_written_and_nowhere_else(backend: Backend, dtype: torch.dtype) -> None:
    blocks, heads, dim, size = 5, 2, 9, 16
    pool = torch.full((2, 3, blocks, heads, dim, size), torch.nan, dtype=dtype)  # two of the pool's layers
    keys, values = pool[0, 1], pool[1, 1].view(blocks, heads, size, dim)
    slots = torch.tensor([0, 17, 79, 31])
    at = slots // size, slice(None), slots % size
    keys.movedim(3, 2)[at] = torch.randn(4, heads, dim).to(dtype)
    values[at] = torch.finfo(dtype).max
    assert backend.finite(keys, values, slots) == (True, True)
    assert backend.finite(keys, values, slots[:0]) == (True, True)
    for bad, value in itertools.product((torch.inf, -torch.inf, torch.nan), (False, True)):
        stored = (values if value else keys.movedim(3, 2))[4, 1, 15]
        before, stored[8] = stored[8].item(), bad
        assert backend.finite(keys, values, slots) == (value, not value)
        assert backend.finite(keys, values, slots[:2]) == (True, True)
        stored[8] = before


# ---- rows that share blocks ----


def forked(w: World, forks: list[tuple[int, int, int]]) -> World:
    """Each fork is (row, parent, positions): the row's first blocks become its parent's, as far as these are whole."""
    table, size = w.inputs.block_table.clone(), w.case.block_size
    for row, parent, positions in forks:
        table[row, : positions // size] = table[parent, : positions // size]
    return replace(w, inputs=replace(w.inputs, block_table=table))


def check_forked(w: World) -> None:
    """Against the truth, and each row's bits against the row alone."""
    tolerance = TOLERANCE[w.case.dtype]
    batch = w.attend(CPU)
    torch.testing.assert_close(batch.double(), reference(w), rtol=tolerance, atol=tolerance)
    assert torch.equal(torch.cat([alone(w, row) for row in range(len(w.case.past))]), batch)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("threads", "group", "block_size"), [(1, 3, 16), (2, 1, 16), (2, 3, 32), (2, 8, 16), (2, 3, 7)]
)
def test_forks_among_others(isa: str, threads: int, group: int, block_size: int) -> None:
    """Two families, one with a fork of a fork, that end at, before and behind a chunk's end; a stranger between."""
    torch.ops.keypast.force_isa(isa)
    torch.set_num_threads(threads)
    past = (700, 40, 1100, 705, 1200, 512, 704, 0, 1300)
    w = make(Case(past, (1, 1, 1, 2, 3, 1, 1, 5, 1), heads=2 * group, block_size=block_size, cache_dtype=torch.float16))
    check_forked(forked(w, [(3, 0, 700), (6, 0, 512), (4, 2, 600), (8, 4, 1100), (5, 2, 512), (1, 0, 40)]))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(PASTS), st.integers(0, 5), st.integers(0, 9)), min_size=2, max_size=9),
    threads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 24, 64]),
    extras=st.sampled_from([0, 2]),
    cache_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    isa=st.sampled_from(ISAS),
)
def test_any_family(
    rows: list[tuple[int, int, int]],
    threads: int,
    group: int,
    head_dim: int,
    extras: int,
    cache_dtype: torch.dtype,
    dtype: torch.dtype,
    causal: bool,
    isa: str,
) -> None:
    """Every row may be a fork of one before it, and shares what both have, down to a vector of keys less."""
    torch.ops.keypast.force_isa(isa)
    torch.set_num_threads(threads)
    past = tuple(p for p, _, _ in rows)
    case = Case(past, tuple(n for _, n, _ in rows), heads=2 * group, head_dim=head_dim, cache_dtype=cache_dtype)
    w = make(replace(case, dtype=dtype, causal=causal, extras=extras))
    parents = [(row, choice % row) for row, (_, _, choice) in enumerate(rows) if row and choice % 3]
    check_forked(forked(w, [(row, p, max(0, min(past[row], past[p]) - 16 * (row % 2))) for row, p in parents]))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_over_one_past_with_masks_of_their_own(isa: str) -> None:
    """Queries alone, all of whose blocks are shared, a partial one too; what a row may not see is not touched."""
    torch.ops.keypast.force_isa(isa)
    w = make(Case((600, 600, 600), (2, 1, 3), keys=(0, 0, 0), causal=False, biased=True, cache_dtype=torch.float16))
    w.inputs.block_table[1:] = w.inputs.block_table[0]
    batch = w.attend(CPU)
    torch.testing.assert_close(batch.double(), reference(w), rtol=2e-5, atol=2e-5)
    torch.set_num_threads(1)
    assert torch.equal(w.attend(CPU), batch)


def test_more_forks_than_a_tile_holds() -> None:
    w = make(Case((300,) * 70, (1,) * 70, cache_dtype=torch.float16))
    check_forked(forked(w, [(row, 0, 300) for row in range(1, 70)]))


# ---- what it refuses ----


@pytest.mark.parametrize(("axis", "slots"), [(3, [80]), (2, [-1]), (1, [0])])
def test_looks_for_nothing_outside_memory(axis: int, slots: list[int]) -> None:
    with pytest.raises(RuntimeError, match="keypast"):
        torch.ops.keypast.finite(torch.zeros(5, 2, 16, 16), axis, torch.tensor(slots))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slots", torch.tensor([10**6])),
        ("block_table", torch.tensor([[1, 99]], dtype=torch.int32)),
        ("present_length", torch.tensor([1000], dtype=torch.int32)),
        ("query_start", torch.tensor([0, 2], dtype=torch.int32)),
        ("slots", torch.tensor([16, 17])),
        ("slots", torch.zeros(0, dtype=torch.int64)),
    ],
)
def test_refuses_indices_outside_memory(field: str, value: Tensor) -> None:
    w = make(Case((20,), (1,)))
    w.inputs = replace(w.inputs, **{field: value})  # type: ignore[arg-type]
    with pytest.raises((ValueError, RuntimeError), match="keypast"):
        w.attend(CPU)


def test_force_isa_refuses_what_the_machine_lacks() -> None:
    with pytest.raises(RuntimeError, match="no such-thing"):
        torch.ops.keypast.force_isa("such-thing")


# ---- norms and gate ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_rms_norm(isa: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    torch.ops.keypast.force_isa(isa)
    for shape in [(1, 576), (70, 576), (5, 3, 64), (4, 1), (2, 3, 2, 10), (0, 16), (7,)]:
        wide = torch.randn(*shape[:-1], shape[-1] + 5).to(dtype)
        x, weight = wide[..., : shape[-1]], torch.randn(shape[-1]).to(weight_dtype)
        residual = torch.randn(shape).to(dtype)
        for added in (None, residual):
            normed, summed = CPU.rms_norm(x, weight, 1e-5, added)
            s = x if added is None else x + added
            assert torch.equal(summed, s), "the residual stream is rounded once"
            truth = s.double() * (s.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
            torch.testing.assert_close(normed.double(), truth, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_gate(isa: str, dtype: torch.dtype) -> None:
    torch.ops.keypast.force_isa(isa)
    for shape in [(1, 3072), (70, 3072), (5, 6), (2, 3, 20), (0, 8)]:
        x = (torch.randn(shape) * 4).to(dtype)
        gate, up = x.double().chunk(2, dim=-1)
        truth = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(CPU.silu_gate(x).double(), truth, rtol=TOLERANCE[dtype], atol=1e-6)


def test_silu_gate_far_out() -> None:
    gate = torch.tensor([-1000.0, -88.0, -20.0, 0.0, 20.0, 88.0, 1000.0, torch.nan])
    out = CPU.silu_gate(torch.cat([gate, torch.ones(8)]))
    torch.testing.assert_close(out, torch.nn.functional.silu(gate), rtol=1e-5, atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_half_precision_conversions_are_exact(isa: str) -> None:
    """Every 16-bit value survives a trip through the pools, and float32 is rounded as torch rounds it."""
    torch.ops.keypast.force_isa(isa)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator, dtype=torch.int64).to(torch.int32)
    for half in (torch.float16, torch.bfloat16):
        exact = every.view(half).float()
        for source in (exact, bits.view(torch.float32), exact * 1.0005, torch.rand(2**16, generator=generator) * 1e-4):
            v = source.reshape(-1, 1, 64)
            k_blocks = torch.zeros(64, 1, 64, 16, dtype=half)
            v_blocks = torch.zeros(64, 1, 16, 64, dtype=half)
            n = torch.zeros(1, dtype=torch.int32)
            inputs = AttentionInputs(
                n.new_zeros(2), n, n, n[None], torch.zeros(1024).long(), torch.arange(1024), causal=True
            )
            CPU.attend(v, v, v, k_blocks, v_blocks, inputs, None, Scoring(1.0))
            torch.testing.assert_close(v_blocks.flatten(), source.to(half), rtol=0, atol=0, equal_nan=True)
            back = CPU.rms_norm(v_blocks.view(1024, 64), torch.ones(64), 1e-5, torch.zeros(1024, 64, dtype=half))[1]
            torch.testing.assert_close(back.flatten(), v_blocks.flatten() + 0, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_do_not_see_each_other(isa: str) -> None:
    torch.ops.keypast.force_isa(isa)
    x, residual, weight = torch.randn(200, 576), torch.randn(200, 576), torch.randn(576)
    normed, _ = CPU.rms_norm(x, weight, 1e-5, residual)
    gated = CPU.silu_gate(x)
    for row in (0, 7, 199):
        one = slice(row, row + 1)
        assert torch.equal(CPU.rms_norm(x[one], weight, 1e-5, residual[one])[0], normed[one])
        assert torch.equal(CPU.silu_gate(x[one]), gated[one])


# ---- the operators and their building ----


def test_operators_trace_and_match_their_schemas() -> None:
    w = make(Case((20,), (3,), rotary_dim=16))
    inputs, rotary = w.inputs, w.rotary
    assert rotary is not None
    checks = ("test_schema", "test_faketensor")
    tables = (inputs.query_start, inputs.past_length, inputs.present_length, inputs.block_table)
    pools = w.k_blocks.nan_to_num(), w.v_blocks.nan_to_num()
    appended = (*tables, inputs.positions, inputs.slots, True, None, None, rotary.cos, rotary.sin, 0.25, None, None)
    torch.library.opcheck(torch.ops.keypast.attend, (w.q, w.k, w.v, *pools, *appended), test_utils=checks)
    extra = w.k[:2].contiguous(), w.v[:2].contiguous()
    alone = (*tables, inputs.positions, inputs.slots[:0], False, None, None, None, None, 0.25, *extra)
    none = torch.empty(0, 2, 16)
    torch.library.opcheck(torch.ops.keypast.attend, (w.q, none, none, *pools, *alone), test_utils=checks)
    x, weight = torch.randn(4, 16), torch.ones(16)
    torch.library.opcheck(torch.ops.keypast.rms_norm, (x, weight, 1e-5), test_utils=checks)
    torch.library.opcheck(torch.ops.keypast.add_rms_norm, (x, x, weight, 1e-5), test_utils=checks)
    torch.library.opcheck(torch.ops.keypast.silu_gate, (x,), test_utils=checks)


def test_one_openmp_runtime() -> None:
    ctypes.CDLL(str(build.load(CACHE).library))
    lines = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in lines if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes


def test_an_unchanged_build_only_loads() -> None:
    loaded = build.load(CACHE)
    assert loaded.isa == torch.ops.keypast.isas()[0]
    assert loaded.library == CACHE / "kernels" / build.digest() / build.LIBRARY
    assert build.load(Path("/nowhere")) is loaded, "once per process, whatever the cache"


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(build.KernelUnavailable, match="no C\\+\\+ compiler: cannot run 'no-such-compiler'"):
        build.build(tmp_path / "kernels" / build.LIBRARY, "no-such-compiler")
    assert not any((tmp_path / "kernels").iterdir()), "nothing half-made is left behind"


def test_a_failing_compiler_is_one_line(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'kernel.cpp:1: error: no vectors here'\necho more\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(build.KernelUnavailable, match=r"^compiling bind failed: kernel.cpp:1: error: no vectors here$"):
        build.build(tmp_path / "out" / build.LIBRARY, str(compiler))


def test_racing_builds_leave_one_library(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"  # writes its own pid to whatever file follows -o
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nsleep 0.05\necho $$ > "$2"\n')
    compiler.chmod(0o755)
    target = tmp_path / "kernels" / build.LIBRARY
    with ThreadPoolExecutor(2) as racing:
        for done in [racing.submit(build.build, target, str(compiler)) for _ in range(2)]:
            done.result()
    assert target.read_text().strip().isdigit()
    assert [path.name for path in target.parent.iterdir()] == [build.LIBRARY]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    build.main(["--cache", str(CACHE)])
    assert "keypast.so" in capsys.readouterr().out


@pytest.mark.slow  # two processes that import torch
def test_another_process_finds_the_build_or_says_why_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine.kernels.build", "--cache", str(tmp_path), "--compiler", "no-such-compiler"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("kernels unavailable: no C++ compiler")
    library = tmp_path / build.load(CACHE).library.relative_to(CACHE)
    library.symlink_to(build.load(CACHE).library)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kernels already built: ")
