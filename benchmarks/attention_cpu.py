"""How close the CPU attention kernels come to what the memory and the arithmetic units allow.

Model: 9 query heads, 3 kv heads of 64 channels, or as many as are wanted; bfloat16 queries, float16 cache in blocks of
16, scattered as they are when a pool has been in use for a while, or in order as a new pool hands them out. Every
timed call works on the next of many distinct layers: keys and values come from memory, as in a model, not from cache.

Rooflines: a decode step can be no faster than reading its K and V bytes once, measured by a plain vector read of the
same layers in the same round. A prefill takes 2 * 64 multiply-adds per (query head, query, visible key); its limit is
the rate of independent ones, of bfloat16 pairs where the processor has them, else float32, measured likewise. Peers:
torch's SDPA, one call per session, over contiguous caches of fewer layers (no paging, no write, kinder to its caches
than a model is).

    python -m benchmarks.attention_cpu [--rounds 7] [--threads 2] [--heads 9 3] [--in-order]
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionInputs, Scoring
from engine.attention.cpu import CpuBackend

DIM, BLOCK = 64, 16
DECODE = ((1, 256), (16, 256), (1, 2048), (16, 2048), (1, 16384))  # (rows, past length)
PREFILL = (512, 2048)
PROBES = r"""
#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __AVX512F__
enum { kBytes = 64 };
#else
enum { kBytes = 32 };
#endif
typedef float Floats __attribute__((vector_size(kBytes)));
typedef long Longs __attribute__((vector_size(kBytes), aligned(16)));

extern "C" long read_bytes(const char* data, long bytes, int threads) {
  long seen = 0;
#pragma omp parallel num_threads(threads) reduction(+ : seen)
  {
    const long n = omp_get_num_threads(), i = omp_get_thread_num(), whole = bytes / (8 * kBytes);
    const Longs *at = (const Longs*)data + whole * i / n * 8, *end = (const Longs*)data + whole * (i + 1) / n * 8;
    Longs sums[8] = {};
    for (; at < end; at += 8)
      for (int j = 0; j < 8; ++j) sums[j] ^= at[j];
    for (int j = 0; j < 8; ++j) seen += sums[j][0];
  }
  return seen;
}

#ifdef __AVX512BF16__
enum { kAtOnce = kBytes / 2 };
static Floats add_products(Floats sum, Floats a) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)a); }
#else
enum { kAtOnce = kBytes / 4 };
static Floats add_products(Floats sum, Floats a) { return sum * a + a; }
#endif

extern "C" float multiply_add(long count, int threads) {  // in twelve chains per thread
  float sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    Floats x[12], a = Floats{} + 0.999f;
    for (auto& y : x) y = Floats{} + 1e-3f;
    for (long i = 0; i < count / threads / 12 / kAtOnce; ++i)
      for (auto& y : x) y = add_products(y, a);
    for (auto& y : x) sum += y[0];
  }
  return sum;
}
"""


@dataclass
class Result:
    """Medians in milliseconds per layer; `of_limit` is limit / ours."""

    name: str
    ours: float
    limit: float
    sdpa_fp32: float
    sdpa_bf16: float
    of_limit: float = 0.0


def probes() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probes.cpp", Path(folder) / "probes.so"
        source.write_text(PROBES)
        flags = ["-O3", "-march=native", "-Wno-psabi", "-fopenmp", "-fPIC", "-shared"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    loaded.multiply_add.argtypes = [ctypes.c_long, ctypes.c_int]
    return loaded


def inputs_for(rows: int, past: int, new: int, in_order: bool) -> AttentionInputs:
    width = -(-(past + new) // BLOCK)
    numbers = torch.arange if in_order else torch.randperm
    table = (numbers(rows * width, dtype=torch.int32) + 1).view(rows, width)
    positions = torch.arange(past, past + new).repeat(rows)
    slots = table.long().gather(1, (positions // BLOCK).view(rows, new)).flatten() * BLOCK + positions % BLOCK
    return AttentionInputs(
        query_start=torch.arange(0, rows * new + 1, new, dtype=torch.int32),
        past_length=torch.full((rows,), past, dtype=torch.int32),
        present_length=torch.full((rows,), past + new, dtype=torch.int32),
        block_table=table,
        positions=positions,
        slots=slots,
        causal=True,
    )


def timed(run: Callable[[int], object], layers: int) -> float:
    """Milliseconds per layer over one pass."""
    started = time.perf_counter()
    for layer in range(layers):
        run(layer)
    return (time.perf_counter() - started) / layers * 1e3


def measure(
    backend: CpuBackend, native: ctypes.CDLL, rows: int, past: int, new: int, options: argparse.Namespace
) -> Result:
    heads, kv_heads = options.heads
    inputs = inputs_for(rows, past, new, options.in_order)
    present = past + new
    blocks = int(inputs.block_table.max()) + 1
    layer_bytes = 2 * blocks * kv_heads * BLOCK * DIM * 2
    layers = max(2, min(1024, (3 << 28) // layer_bytes)) if new == 1 else 4
    pool = torch.randn(1, 2, layer_bytes // 4).half().expand(layers, -1, -1).contiguous()  # K, V of each layer in turn
    k_layers = pool[:, 0].view(layers, blocks, kv_heads, DIM, BLOCK).unbind()
    v_layers = pool[:, 1].view(layers, blocks, kv_heads, BLOCK, DIM).unbind()
    qkv = torch.randn(rows * new, heads + 2 * kv_heads, DIM, dtype=torch.bfloat16)
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    scoring = Scoring(DIM**-0.5)

    def ours(layer: int) -> Tensor:
        return backend.attend(q, k, v, k_layers[layer], v_layers[layer], inputs, None, scoring)

    def limit(layer: int) -> None:
        if new == 1:
            native.read_bytes(k_layers[layer].data_ptr(), layer_bytes, options.threads)
        else:
            native.multiply_add(rows * heads * DIM * 2 * sum(range(past + 1, present + 1)), options.threads)

    def sdpa(dtype: torch.dtype) -> Callable[[int], object]:
        some = max(1, min(layers, (1 << 29) // (layer_bytes * dtype.itemsize // 2)))
        keys = torch.randn(some, 2, 1, kv_heads, present, DIM).to(
            dtype
        )  # one session's; every session of a layer reads it
        queries = torch.randn(1, heads, new, DIM).to(dtype)

        def run(layer: int) -> None:
            one = keys[layer % some]
            for _ in range(rows):
                F.scaled_dot_product_attention(queries, one[0], one[1], is_causal=new > 1, enable_gqa=True)

        return run

    calls: dict[str, tuple[Callable[[int], object], int]] = {
        "ours": (ours, layers),
        "limit": (limit, layers),
        "sdpa_fp32": (sdpa(torch.float32), min(layers, 4)),
        "sdpa_bf16": (sdpa(torch.bfloat16), min(layers, 4)),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, (run, passes) in calls.items():
            times[name].append(timed(run, passes))
    name = f"decode {rows}x{past}" if new == 1 else f"prefill {new}"
    result = Result(name, **{key: statistics.median(values) for key, values in times.items()})
    result.of_limit = statistics.median(a / b for a, b in zip(times["limit"], times["ours"], strict=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--heads", type=int, nargs=2, default=(9, 3), metavar=("QUERY", "KV"))
    parser.add_argument("--in-order", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backend = CpuBackend(Path.home() / ".cache" / "keypast")
    native = probes()
    print(f"{backend!r}, {arguments.threads} threads, medians of {arguments.rounds} interleaved rounds, ms per layer")
    print(f"{'':16}{'ours':>9}{'limit':>9}{'of limit':>10}{'sdpa fp32':>11}{'sdpa bf16':>11}{'bf16/ours':>11}")
    results = []
    with torch.inference_mode():
        for rows, past, new in [*((r, p, 1) for r, p in DECODE), *((1, 0, n) for n in PREFILL)]:
            r = measure(backend, native, rows, past, new, arguments)
            results.append(r)
            print(
                f"{r.name:16}{r.ours:9.4f}{r.limit:9.4f}{r.of_limit:10.2f}{r.sdpa_fp32:11.3f}{r.sdpa_bf16:11.3f}"
                f"{r.sdpa_bf16 / r.ours:11.1f}",
                flush=True,
            )
    print(
        json.dumps({"isa": backend.kernels.isa, "threads": arguments.threads, "results": [asdict(r) for r in results]})
    )


if __name__ == "__main__":
    main()
