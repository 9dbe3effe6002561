"""Whether a backend runs on the GPU that there is, and how long it takes for a step's attention."""

import torch

from engine.attention.base import AttentionInputs, Backend, Rotary, Scoring
from engine.kv_pool import KVPool
from engine.specs import KVSpec

ROWS, CONTEXT, HEADS, KV_HEADS, DIM, BLOCK = 32, 4096, 32, 8, 128, 16
TIMES = 10


def try_out(backend: Backend, device: str) -> None:
    """Raises whatever one small kernel raises there."""
    ones = torch.ones(1, 16, device=device)
    normed, _ = backend.rms_norm(ones, ones[0], 0.0)
    if not torch.equal(normed, ones):
        raise RuntimeError(f"the norm of ones is {normed.tolist()}")


@torch.inference_mode()
def step_seconds(backend: Backend, device: str = "cuda") -> float:
    """Median of ten, 32 rows of 4,096 positions, planned anew each time as a pass would."""
    width = CONTEXT // BLOCK
    pool = KVPool(KVSpec(1, KV_HEADS, DIM, "float16"), ROWS * width + 1, BLOCK, device)
    pool.k.zero_()
    pool.v.zero_()
    table = (torch.randperm(ROWS * width, device=device, dtype=torch.int32) + 1).view(ROWS, width)
    last = torch.full((ROWS,), CONTEXT - 1, device=device)
    q, k, v = (
        torch.ones(ROWS, heads, DIM, dtype=torch.float16, device=device) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    rotary = Rotary(*torch.ones(2, CONTEXT, DIM // 2, device=device).unbind())
    times = []
    for _ in range(TIMES + 2):  # the first ones compile
        inputs = AttentionInputs(
            query_start=torch.arange(ROWS + 1, dtype=torch.int32, device=device),
            past_length=last.int(),
            present_length=last.int() + 1,
            block_table=table,
            positions=last,
            slots=table[:, -1].long() * BLOCK + BLOCK - 1,
            causal=True,
            steps=True,
        )
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        backend.attend(q, k, v, *pool.layers[0], inputs, rotary, Scoring(DIM**-0.5))
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(sorted(times[2:])[TIMES // 2])
