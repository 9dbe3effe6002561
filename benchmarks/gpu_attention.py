"""Decode attention on a GPU: one new position a row over a scattered past, 32 heads, 8 kv heads of 128, float16.

Every row has the same context. A call rotates, writes keys and values to their slots and attends, as a layer's step
does, and is timed as a graph; calls go round over pools that together are larger than the device's cache. Roofline:
the bytes of all keys and values, read once, over the bandwidth that a plain copy reaches on this device.

Peers do less: SDPA and FlexAttention attend over a padded cache in one piece without paging, rotation or writes, and
FlashInfer over the same pages without rotation or writes. A peer that is not there, or fails, is told so.

    python -m benchmarks.gpu_attention [--batch 1 8 32 128 256] [--context 1024 4096 32768] [--sweep]
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import Gpu, NoGpu
from engine.attention.base import AttentionInputs, Backend, Rotary, Scoring
from engine.attention.cuda import TritonBackend, Tuning
from engine.kv_pool import KVPool
from engine.specs import KVSpec

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
CACHE = 256 << 20  # bytes of the pools that calls go round over, several times a device's L2
MOST_POOLS = 64  # enough for the smallest case to leave the cache
MOST = 40 << 30  # bytes of one pool; larger cases are left out
TUNINGS = [
    Tuning(split=split, tile=tile, warps=warps, stages=stages)
    for split in (256, 512, 1024)
    for tile, warps, stages in ((32, 4, 4), (64, 4, 3), (64, 8, 3), (128, 4, 2), (128, 8, 3))
]


@dataclass
class Result:
    """`ms` a call, `of_copy` the share of the copy's bandwidth; `peers`, ms by name, or why there are none."""

    batch: int
    context: int
    ms: float
    tb_per_second: float
    of_copy: float
    peers: dict[str, float | str] = field(default_factory=dict)


class Decode:
    """One step of `batch` rows of `context` positions, the new one included."""

    def __init__(self, batch: int, context: int, machine: Gpu) -> None:
        self.batch, self.context, self.machine, device = batch, context, machine, machine.device
        self.bytes = 2 * batch * context * KV_HEADS * DIM * 2
        width = -(-context // BLOCK)
        layers = max(1, min(MOST_POOLS, CACHE // self.bytes))
        self.pool = KVPool(KVSpec(layers, KV_HEADS, DIM, "float16"), batch * width + 1, BLOCK, device, transposed=False)
        for tensor in (self.pool.k, self.pool.v):
            tensor.normal_()
        table = (torch.randperm(batch * width, device=device, dtype=torch.int32) + 1).view(batch, width)
        last = torch.full((batch,), context - 1, device=device)
        slots = table[:, (context - 1) // BLOCK].long() * BLOCK + (context - 1) % BLOCK
        self.inputs = AttentionInputs(
            query_start=torch.arange(batch + 1, dtype=torch.int32, device=device),
            past_length=last.int(),
            present_length=last.int() + 1,
            block_table=table,
            positions=last,
            slots=slots,
            causal=True,
            steps=True,
        )
        angles = torch.rand(context, DIM // 2, device=device)
        self.rotary = Rotary(angles.cos(), angles.sin())
        qkv = torch.randn(batch, HEADS + 2 * KV_HEADS, DIM, dtype=torch.float16, device=device)
        self.q, self.k, self.v = torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS], dim=1)

    def attend(self, backend: Backend, layer: int) -> Tensor:
        scoring = Scoring(DIM**-0.5)
        return backend.attend(self.q, self.k, self.v, *self.pool.layers[layer], self.inputs, self.rotary, scoring)

    def ours(self, tuning: Tuning = Tuning()) -> float:
        backend = TritonBackend(tuning)
        layers = range(len(self.pool.layers))
        return self.machine.milliseconds([self.machine.recorded(partial(self.attend, backend, n)) for n in layers])

    def padded(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q, k and v of as many caches as there are pools, so that none of them stays in the device's."""
        shape = (2, self.batch, KV_HEADS, self.context, DIM)
        caches = [torch.randn(shape, dtype=torch.float16, device=self.machine.device) for _ in self.pool.layers]
        return [(self.q.unsqueeze(2).contiguous(), kv[0], kv[1]) for kv in caches]

    def sdpa(self) -> float:
        attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
        return self.machine.milliseconds([self.machine.recorded(partial(attend, *qkv)) for qkv in self.padded()])

    def flex(self) -> float:
        from torch.nn.attention.flex_attention import flex_attention

        compiled: Any = partial(self.machine.compiled(flex_attention), enable_gqa=True)
        return self.machine.milliseconds([partial(compiled, *qkv) for qkv in self.padded()])

    def flashinfer(self) -> float:
        import flashinfer

        width = self.inputs.block_table.shape[1]
        workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=self.machine.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        starts = torch.arange(self.batch + 1, dtype=torch.int32, device=self.machine.device) * width
        last = torch.full_like(starts[1:], (self.context - 1) % BLOCK + 1)
        wrapper.plan(
            starts, self.inputs.block_table.flatten(), last, HEADS, KV_HEADS, DIM, BLOCK, q_data_type=torch.float16
        )
        q = self.q.contiguous()
        pages = [(k.transpose(-1, -2), v) for k, v in self.pool.layers]

        def call(pair: tuple[Tensor, Tensor]) -> Callable[[], object]:
            return lambda: wrapper.run(q, pair)

        return self.machine.milliseconds([call(pair) for pair in pages])


def attempt(peer: Callable[[], float]) -> float | str:
    """A peer may be missing, or lack a kernel for this device; the table then says why, and goes on."""
    try:
        return peer()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


def measure(batch: int, context: int, bandwidth: float, machine: Gpu) -> Result:
    case = Decode(batch, context, machine)
    ms = case.ours()
    rate = case.bytes / ms * 1e3
    others: dict[str, Callable[[], float]] = {"sdpa": case.sdpa, "flex": case.flex, "flashinfer": case.flashinfer}
    told = {name: attempt(peer) for name, peer in others.items()}
    return Result(batch, context, ms, rate / 1e12, rate / bandwidth, told)


def fits(batch: int, context: int, machine: Gpu) -> bool:
    return 2 * batch * context * KV_HEADS * DIM * 2 <= min(MOST, machine.free() // 3)


def line(result: Result) -> str:
    peers = " | ".join(f"{told:.4f}" if isinstance(told, float) else told for told in result.peers.values())
    return (
        f"| {result.batch} | {result.context} | {result.ms:.4f} | {result.tb_per_second:.2f} | {result.of_copy:.2f} |"
        f" {peers} |"
    )


HEADER = """| batch | context | ms | TB/s | of copy | SDPA, ms | FlexAttention, ms | FlashInfer, ms |
|---|---|---|---|---|---|---|---|"""


def sweep(batch: int, context: int, bandwidth: float, machine: Gpu) -> None:
    """Which tuning is fastest here; the defaults in engine.attention.cuda are for a person to change."""
    case = Decode(batch, context, machine)
    timed = sorted((case.ours(tuning), repr(tuning)) for tuning in TUNINGS)
    print(f"batch {batch}, context {context}")
    for ms, tuning in timed:
        print(f"  {ms:.4f} ms, {case.bytes / ms * 1e3 / bandwidth:.2f} of copy: {tuning}", flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_attention")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 32768])
    parser.add_argument("--sweep", action="store_true", help="time every tuning of the kernels instead of peers")
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        machine = Gpu()
    except NoGpu as reason:
        print(reason)
        return 1
    bandwidth = machine.copy_bandwidth()
    print(f"{machine.name}: a copy reaches {bandwidth / 1e12:.2f} TB/s")
    results = []
    print(HEADER)
    with torch.inference_mode():
        for context in given.context:
            for batch in given.batch:
                if not fits(batch, context, machine):
                    print(f"batch {batch}, context {context}: left out, too large for this device")
                elif given.sweep:
                    sweep(batch, context, bandwidth, machine)
                else:
                    results.append(measure(batch, context, bandwidth, machine))
                    print(line(results[-1]), flush=True)
    print(json.dumps({"device": machine.name, "copy": bandwidth, "results": [asdict(result) for result in results]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
