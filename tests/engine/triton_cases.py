"""What the Triton kernels must do, as data and one check: for pytest, and for a GPU machine that may not have it."""

from dataclasses import replace

import torch

from engine.attention.cuda import TritonBackend, Tuning
from engine.attention.sdpa import SdpaBackend
from tests.engine.attention_cases import Case, World, make, reference

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {SINGLE: 2e-5, HALF: 2e-3, BRAIN: 1.6e-2}  # of the output's last places
SMALL = Tuning(split=32, tile=16, lanes=16)  # so that short pasts have many splits and tiles
RAGGED = Case((0, 33, 70), (5, 3, 1), heads=4)

CASES: dict[str, Case] = {
    "ragged": RAGGED,
    "steps": Case((0, 15, 31, 32, 96), (1,) * 5, heads=2, kv_heads=1),
    "nothing": Case((3, 0), (0, 0)),
    "rows_of_no_query": Case((20, 40, 5), (0, 1, 0), keys=(3, 0, 0), causal=False),
    "heads_alike": replace(RAGGED, heads=2, kv_heads=2),
    "one_kv_head": replace(RAGGED, heads=3, kv_heads=1),
    "wide_group": Case((40,), (3,), heads=20, kv_heads=1),
    "head_of_one": replace(RAGGED, head_dim=1),
    "odd_head": replace(RAGGED, head_dim=24, rotary_dim=16),
    "head_of_64": replace(RAGGED, head_dim=64, rotary_dim=64),
    "small_blocks": replace(RAGGED, block_size=5),
    "large_blocks": replace(RAGGED, block_size=32),
    "rotated": replace(RAGGED, rotary_dim=16, cache_dtype=HALF),
    "half_rotated": replace(RAGGED, rotary_dim=8),
    "not_causal": replace(RAGGED, causal=False),
    "masked": replace(RAGGED, causal=False, biased=True),
    "masked_and_causal": replace(RAGGED, biased=True, new=(1, 3, 8)),
    "extra_keys": replace(RAGGED, extras=2),
    "extra_keys_masked": replace(RAGGED, extras=1, biased=True, causal=False),
    "extra_keys_alone": Case((0, 0), (2, 1), keys=(0, 0), extras=1, causal=False),
    "queries_alone": Case((33, 8), (3, 1), keys=(0, 0), causal=False),
    "keys_alone": Case((33, 8), (0, 0), keys=(4, 40), causal=False),
    "more_keys_than_queries": Case((33, 8, 0), (2, 1, 7), keys=(9, 4, 3), causal=False, biased=True),
    "float16": replace(RAGGED, dtype=HALF, cache_dtype=HALF, rotary_dim=16, seed=1),
    "float16_masked": replace(RAGGED, dtype=HALF, cache_dtype=HALF, causal=False, biased=True, extras=1),
    "bfloat16_over_float16": replace(RAGGED, dtype=BRAIN, cache_dtype=HALF, rotary_dim=16),
    "float32_over_float16": replace(RAGGED, cache_dtype=HALF),
    "bfloat16": replace(RAGGED, dtype=BRAIN, cache_dtype=BRAIN, rotary_dim=16),
    "float16_over_bfloat16": replace(RAGGED, dtype=HALF, cache_dtype=BRAIN),
}


def check(case: Case, tuning: Tuning = SMALL, device: str = "cpu", transposed: bool = False) -> None:
    """Output against float64, what was written against the slow truth, probabilities against the slow truth's.

    `transposed`: keys lie as on a CPU. Raises AssertionError.
    """
    w = make(case)
    here = w.to(device)
    if not transposed:
        here = replace(here, k_blocks=here.k_blocks.transpose(2, 3).contiguous().transpose(2, 3))
    backend, truth = TritonBackend(tuning), SdpaBackend()
    out, *pools = here.run(backend)
    slow, *slow_pools = w.run(truth)
    assert out.dtype == slow.dtype
    tolerance = max(TOLERANCE[case.dtype], TOLERANCE[BRAIN] if case.cache_dtype == BRAIN else 0)
    close(out, reference(w), tolerance)
    for pool, expected in zip(pools, slow_pools, strict=True):
        # Rounded once. Triton's interpreter cuts bfloat16 off instead; a GPU may fuse a product and a sum.
        close(pool, expected, TOLERANCE[case.cache_dtype] / 2)
        assert torch.equal(pool.isnan().cpu(), expected.isnan())  # nothing else was written
    check_probabilities(w, here, backend, slow_pools[0])


def check_probabilities(w: World, here: World, backend: TritonBackend, keys: torch.Tensor) -> None:
    expected = SdpaBackend().probabilities(w.q, keys, w.inputs, w.rotary, w.scoring)
    got = backend.probabilities(here.q, keys.to(here.q.device), here.inputs, here.rotary, here.scoring)
    tolerance = 1e-5 if w.case.dtype == w.case.cache_dtype == SINGLE else 2 * TOLERANCE[w.case.cache_dtype]
    assert [part.shape for part in got] == [part.shape for part in expected]
    for part, other in zip(got, expected, strict=True):
        close(part, other, tolerance)
        assert torch.equal(part.cpu() == 0, other == 0)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def one_row(w: World, row: int) -> World:
    """The row alone, with a table as wide as it needs."""
    inputs = w.inputs
    start, stop = inputs.query_start[row : row + 2].tolist()
    present = int(inputs.present_length[row])
    width = -(-present // w.case.block_size)
    alone = replace(
        inputs,
        query_start=torch.tensor([0, stop - start], dtype=torch.int32),
        past_length=inputs.past_length[row : row + 1],
        present_length=inputs.present_length[row : row + 1],
        block_table=inputs.block_table[row : row + 1, :width].contiguous(),
        positions=inputs.positions[start:stop],
        slots=inputs.slots[start:stop],
        steps=stop - start == 1,
    )
    return replace(w, q=w.q[start:stop], k=w.k[start:stop], v=w.v[start:stop], inputs=alone)
