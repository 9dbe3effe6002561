"""The native kernels against plain float64 arithmetic, and against themselves: a query's bits depend on no company.

Tolerances: a result in dtype D may be one rounding of D from the truth, after sums in float32 over caches whose
contents the reference reads exactly as they were stored. So: a few units of D's last place, relative to values near 1.
"""

import ctypes
import itertools
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.base import AttentionInputs, Rotary, Scoring
from engine.attention.cpu import CpuBackend
from engine.kernels import build

CACHE = Path.home() / ".cache" / "keypast"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # 2^-10 and 2^-7 doubled; fp32 sums
CPU = CpuBackend(CACHE)
ISAS: list[str] = torch.ops.keypast.isas()


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), torch.ops.keypast.isa()
    yield
    torch.set_num_threads(threads)
    torch.ops.keypast.force_isa(isa)


@dataclass(frozen=True)
class Case:
    """A ragged batch: row r has `past[r]` positions behind it and appends `new[r]`."""

    past: tuple[int, ...]
    new: tuple[int, ...]
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32
    causal: bool = True
    rotary_dim: int = 0
    biased: bool = False
    seed: int = 0


@dataclass
class World:
    """A case made concrete: every tensor that `attend` takes. Slots that hold nothing are NaN."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    k_blocks: Tensor
    v_blocks: Tensor
    inputs: AttentionInputs
    rotary: Rotary | None
    scale: float

    def attend(self, backend: CpuBackend = CPU) -> Tensor:
        """Runs on copies of the pools, so that a world can be run again."""
        pools = self.k_blocks.clone(), self.v_blocks.clone()
        return backend.attend(self.q, self.k, self.v, *pools, self.inputs, self.rotary, Scoring(self.scale))


def make(case: Case) -> World:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, size, present = len(case.past), case.block_size, [p + n for p, n in zip(case.past, case.new, strict=True)]
    needs = [-(-length // size) for length in present]
    blocks, total = sum(needs) + 3, sum(case.new)
    order = (torch.randperm(blocks - 1, generator=generator) + 1).tolist()
    table = torch.zeros(rows, max([1, *needs]), dtype=torch.int32)
    k_blocks = torch.full((blocks, case.kv_heads, case.head_dim, size), torch.nan).to(case.cache_dtype)
    v_blocks = torch.full((blocks, case.kv_heads, size, case.head_dim), torch.nan).to(case.cache_dtype)
    slots, positions = [], []
    for r in range(rows):
        own = [order.pop() for _ in range(needs[r])]
        table[r, : needs[r]] = torch.tensor(own, dtype=torch.int32)
        for position in range(present[r]):
            block, offset = own[position // size], position % size
            if position < case.past[r]:
                k_blocks[block, :, :, offset] = normal(case.kv_heads, case.head_dim).to(case.cache_dtype)
                v_blocks[block, :, offset] = normal(case.kv_heads, case.head_dim).to(case.cache_dtype)
            else:
                slots.append(block * size + offset)
                positions.append(position)
    # One wide tensor, as a fused projection gives it: q, k and v are strided views.
    qkv = normal(total, case.heads + 2 * case.kv_heads, case.head_dim).to(case.dtype)
    q, k, v = torch.split(qkv, [case.heads, case.kv_heads, case.kv_heads], dim=1)
    bias, bias_start = None, None
    if case.biased:
        sizes = torch.tensor([n * length for n, length in zip(case.new, present, strict=True)])
        bias_start = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        bias = normal(int(sizes.sum()))
        bias[torch.rand(bias.shape, generator=generator) < 0.3] = -torch.inf
        if case.new[0]:
            bias[: present[0]] = -torch.inf  # the first query sees nothing
    rotary = None
    if case.rotary_dim:
        angles = normal(max([1, *present]), case.rotary_dim // 2) * 3
        rotary = Rotary(angles.cos(), angles.sin())
    starts = [sum(case.new[:r]) for r in range(rows + 1)]
    inputs = AttentionInputs(
        query_start=torch.tensor(starts, dtype=torch.int32),
        past_length=torch.tensor(case.past, dtype=torch.int32),
        present_length=torch.tensor(present, dtype=torch.int32),
        block_table=table,
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        causal=case.causal,
        bias=bias,
        bias_start=bias_start,
    )
    return World(case, q, k, v, k_blocks, v_blocks, inputs, rotary, case.head_dim**-0.5)


def rotated(x: Tensor, positions: Tensor, rotary: Rotary | None) -> Tensor:
    """(T, heads, head_dim) in float32, as the contract says it."""
    x = x.float()
    if rotary is None:
        return x
    cos, sin = rotary.cos[positions][:, None], rotary.sin[positions][:, None]
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def reference(w: World) -> Tensor:
    """The contract in float64, one query at a time. (T, heads * head_dim)"""
    inputs, size = w.inputs, w.case.block_size
    cache = w.case.cache_dtype
    k_blocks, v_blocks = w.k_blocks.double(), w.v_blocks.double()
    k, v = rotated(w.k, inputs.positions, w.rotary).to(cache).double(), w.v.to(cache).double()
    for t, slot in enumerate(inputs.slots.tolist()):
        k_blocks[slot // size, :, :, slot % size] = k[t]
        v_blocks[slot // size, :, slot % size] = v[t]
    q = rotated(w.q, inputs.positions, w.rotary).double()
    out = torch.zeros(q.shape, dtype=torch.float64)
    for r in range(len(inputs.past_length)):
        start, end = inputs.query_start[r : r + 2].tolist()
        past, present = int(inputs.past_length[r]), int(inputs.present_length[r])
        own = inputs.block_table[r].long()
        keys = k_blocks[own].permute(1, 2, 0, 3).flatten(2)[:, :, :present]
        values = v_blocks[own].transpose(0, 1).flatten(1, 2)[:, :present]
        keys = keys.repeat_interleave(w.case.heads // w.case.kv_heads, dim=0)
        values = values.repeat_interleave(w.case.heads // w.case.kv_heads, dim=0)
        limits = past + torch.arange(end - start)[:, None] if inputs.causal else torch.full((end - start, 1), present)
        scores = (q[start:end].transpose(0, 1) @ keys) * w.scale  # (heads, n, present)
        seen = torch.arange(present) <= limits
        if inputs.bias is not None and inputs.bias_start is not None:
            first, last = inputs.bias_start[r : r + 2].tolist()
            bias = inputs.bias[first:last].view(end - start, present).double()
            scores, seen = scores + bias, seen & (bias > -torch.inf)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()  # nothing seen: 0 / 0
        out[start:end] = (weights @ values).transpose(0, 1)
    return out.flatten(1)


def check(case: Case) -> None:
    w = make(case)
    out = w.attend()
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.double(), reference(w), rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])


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
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 15, 16, 255, 256, 257, 511, 512, 513, 700]), st.integers(0, 40)), max_size=5
    ),
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
    rows: list[tuple[int, int]],
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
    past, new = tuple(p for p, _ in rows), tuple(n for _, n in rows)
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
            rotary_dim=int(head_dim * rotary) // 2 * 2,
            biased=biased and bool(rows),
            seed=seed,
        )
    )


def test_writes_the_pools() -> None:
    w = make(Case((5, 0), (2, 18), head_dim=24, rotary_dim=10, dtype=torch.bfloat16, cache_dtype=torch.float16))
    CPU.attend(w.q, w.k, w.v, w.k_blocks, w.v_blocks, w.inputs, w.rotary, Scoring(w.scale))
    block, offset = w.inputs.slots // 16, w.inputs.slots % 16
    rotated_k = rotated(w.k, w.inputs.positions, w.rotary).half()
    assert torch.equal(w.k_blocks[block, :, :, offset], rotated_k), "float32 rotation, then one rounding"
    assert torch.equal(w.v_blocks[block, :, offset], w.v.half())


def test_padding_positions_write_to_the_null_block_and_give_zeros() -> None:
    w = make(Case((40, 0), (1, 0)))
    w.inputs = replace(w.inputs, slots=torch.zeros(1, dtype=torch.int64), query_start=torch.zeros(3, dtype=torch.int32))
    CPU.attend(w.q, w.k, w.v, w.k_blocks, w.v_blocks, w.inputs, None, Scoring(w.scale))
    assert torch.equal(w.k_blocks[0, :, :, 0], w.k[0])
    w.k_blocks[0].fill_(torch.nan)
    assert torch.equal(w.attend(), torch.zeros(1, w.q.shape[1] * w.q.shape[2]))


def test_empty_row_gives_zeros() -> None:
    w = make(Case((0, 20), (1, 1)))
    w.inputs.present_length[0] = 0
    out = w.attend()
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].isfinite().all()


def test_masked_values_do_not_leak() -> None:
    """A NaN behind a -inf bias, or ahead of a causal query, must not be multiplied by zero."""
    w = make(Case((40,), (12,), heads=3, kv_heads=1, biased=True))
    assert w.inputs.bias is not None
    w.inputs.bias.view(12, 52)[:, 7] = -torch.inf
    clean = w.attend()
    block = w.inputs.block_table[0, 0]
    w.k_blocks[block, :, :, 7] = torch.nan
    w.v_blocks[block, :, 7] = torch.inf
    assert torch.equal(w.attend(), clean)
    w.v[5] = torch.nan
    assert torch.equal(w.attend()[:5], clean[:5])


def test_overflow_stays_in_its_own_query() -> None:
    w = make(Case((40,), (3,), heads=1, kv_heads=1))
    clean = w.attend()
    w.q[1] = torch.nan
    out = w.attend()
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
        parts.append(CPU.attend(w.q[new], w.k[new], w.v[new], k_blocks, v_blocks, inputs, w.rotary, Scoring(w.scale)))
        start += n
    return torch.cat(parts)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block_size", [16, 32, 7])
@pytest.mark.parametrize(("heads", "head_dim"), [(6, 64), (2, 64), (14, 24)])
def test_prefill_equals_chunks_and_steps(isa: str, block_size: int, heads: int, head_dim: int) -> None:
    torch.ops.keypast.force_isa(isa)
    w = make(replace(SAME, heads=heads, head_dim=head_dim, rotary_dim=head_dim, block_size=block_size))
    whole = w.attend()
    assert torch.equal(in_chunks(w, [1] * 300), whole)
    for sizes in ([1, 299], [299, 1], [211, 1, 88], [212, 88], [213, 87], [3, 7, 100, 103, 1, 86]):  # 512 is a border
        assert torch.equal(in_chunks(w, sizes), whole), sizes


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 299), max_size=12), isa=st.sampled_from(ISAS))
def test_prefill_equals_any_chunks(cuts: set[int], isa: str) -> None:
    torch.ops.keypast.force_isa(isa)
    w = make(SAME)
    edges = [0, *sorted(cuts), 300]
    assert torch.equal(in_chunks(w, [b - a for a, b in itertools.pairwise(edges)]), w.attend())


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
    return replace(w, inputs=own, q=w.q[start:end], k=w.k[start:end], v=w.v[start:end]).attend()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [True, False])
def test_alone_equals_in_a_batch_on_any_threads(isa: str, causal: bool) -> None:
    torch.ops.keypast.force_isa(isa)
    w = make(replace(SAME, past=(0, 700, 255, 1500, 16), new=(40, 1, 2, 1, 100), causal=causal))
    torch.set_num_threads(1)
    batch = w.attend()
    assert torch.equal(torch.cat([alone(w, row) for row in range(5)]), batch)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(w.attend(), batch)
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
    assert torch.equal(replace(w, inputs=moved, k_blocks=k_blocks, v_blocks=v_blocks).attend(), w.attend())


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slots", torch.tensor([10**6])),
        ("block_table", torch.tensor([[1, 99]], dtype=torch.int32)),
        ("present_length", torch.tensor([1000], dtype=torch.int32)),
        ("query_start", torch.tensor([0, 2], dtype=torch.int32)),
    ],
)
def test_refuses_indices_outside_memory(field: str, value: Tensor) -> None:
    w = make(Case((20,), (1,)))
    w.inputs = replace(w.inputs, **{field: value})  # type: ignore[arg-type]
    with pytest.raises((ValueError, RuntimeError), match="keypast"):
        w.attend()


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
    arguments = (*tables, inputs.positions, inputs.slots, True, None, None, rotary.cos, rotary.sin, 0.25)
    pools = w.k_blocks.nan_to_num(), w.v_blocks.nan_to_num()
    torch.library.opcheck(torch.ops.keypast.attend, (w.q, w.k, w.v, *pools, *arguments), test_utils=checks)
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
    assert loaded.isa == ISAS[0]
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


def test_another_process_finds_the_build_or_says_why_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine.kernels.build", "--cache", str(tmp_path), "--compiler", "no-such-compiler"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("kernels unavailable: no C++ compiler")
    library = tmp_path / build.load(CACHE).library.relative_to(CACHE)
    library.symlink_to(build.load(CACHE).library)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kernels already built: ")
