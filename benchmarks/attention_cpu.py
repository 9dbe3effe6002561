"""How close the CPU attention kernels come to what the memory and the arithmetic units allow.

Model: 9 query heads, 3 kv heads of 64 channels; bfloat16 queries, float16 cache in blocks of 16. Each timed call works on
the next of many distinct layers, so that keys and values come from memory as they do in a model, not from cache.

Rooflines: a decode step can be no faster than reading its K and V bytes once, measured here by a plain AVX read of the
same layers in the same round ("read"). A prefill needs 4 * 64 float32 operations per (query head, query, visible key);
its limit is the rate of independent fused multiply-adds, measured likewise ("fma").

    python benchmarks/attention_cpu.py [--rounds 7] [--threads 2]
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

from engine.attention.base import AttentionInputs
from engine.attention.cpu import CpuBackend

HEADS, KV_HEADS, DIM, BLOCK = 9, 3, 64, 16
DECODE = ((1, 256), (16, 256), (1, 2048), (16, 2048), (1, 16384))  # (rows, past length)
PREFILL = (512, 2048)
PROBES = r"""
#include <immintrin.h>
#include <omp.h>
typedef float Lane __attribute__((vector_size(32)));

extern "C" float read_bytes(const char* data, long bytes, int threads) {
  __m256i all = _mm256_setzero_si256();
  long seen = 0;
#pragma omp parallel num_threads(threads) reduction(+ : seen)
  {
    const long n = omp_get_num_threads(), i = omp_get_thread_num();
    const char *at = data + bytes / 256 * i / n * 256, *end = data + bytes / 256 * (i + 1) / n * 256;
    __m256i sums[8] = {};
    for (; at < end; at += 256)
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sums[j] = _mm256_xor_si256(sums[j], _mm256_loadu_si256((const __m256i*)(at + 32 * j)));
    for (int j = 1; j < 8; ++j) sums[0] = _mm256_xor_si256(sums[0], sums[j]);
    seen += _mm256_extract_epi64(sums[0], 0);
  }
  return (float)seen + _mm256_extract_epi32(all, 0);
}

template <class V> static float spin(long times) {
  V x[12], a, b;
  for (unsigned j = 0; j < sizeof a / 4; ++j) a[j] = 0.999f, b[j] = 1e-3f;
  for (auto& y : x) y = b;
  for (long i = 0; i < times; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) { x[j] = x[j] * a + b; asm("" : "+v"(x[j])); }
  float sum = 0;
  for (auto& y : x) sum += y[0];
  return sum;
}
typedef float Wide __attribute__((vector_size(64)));
__attribute__((target("avx512f"))) static float spin_wide(long times) {
  Wide x[12], a, b;
  for (int j = 0; j < 16; ++j) a[j] = 0.999f, b[j] = 1e-3f;
  for (auto& y : x) y = b;
  for (long i = 0; i < times; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) { x[j] = x[j] * a + b; asm("" : "+v"(x[j])); }
  float sum = 0;
  for (auto& y : x) sum += y[0];
  return sum;
}

// Performs `fmas` float multiply-adds.
extern "C" float multiply_add(long fmas, int threads) {
  float sum = 0;
  const bool wide = __builtin_cpu_supports("avx512f");
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  sum += wide ? spin_wide(fmas / threads / 12 / 16) : spin<Lane>(fmas / threads / 12 / 8);
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
        command = ["g++", "-O2", "-mavx2", "-mfma", "-Wno-psabi", "-fopenmp", "-fPIC", "-shared", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    loaded.multiply_add.argtypes = [ctypes.c_long, ctypes.c_int]
    return loaded


def inputs_for(rows: int, past: int, new: int) -> AttentionInputs:
    """Each row's blocks are scattered over the pool, as they are after a while of serving."""
    width = -(-(past + new) // BLOCK)
    table = (torch.randperm(rows * width, dtype=torch.int32) + 1).view(rows, width)
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


def measure(backend: CpuBackend, native: ctypes.CDLL, rows: int, past: int, new: int, rounds: int, threads: int) -> Result:
    inputs = inputs_for(rows, past, new)
    present = past + new
    blocks = int(inputs.block_table.max()) + 1
    layer_bytes = 2 * blocks * KV_HEADS * BLOCK * DIM * 2
    layers = max(2, min(1024, (3 << 28) // layer_bytes)) if new == 1 else 4
    k_blocks = torch.randn(blocks, KV_HEADS, DIM, BLOCK).half().repeat(layers, 1, 1, 1, 1)
    v_blocks = torch.randn(blocks, KV_HEADS, BLOCK, DIM).half().repeat(layers, 1, 1, 1, 1)
    qkv = torch.randn(rows * new, HEADS + 2 * KV_HEADS, DIM, dtype=torch.bfloat16)
    q, k, v = torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS], dim=1)  # type: ignore[no-untyped-call]

    def ours(layer: int) -> Tensor:
        return backend.attend(q, k, v, k_blocks[layer], v_blocks[layer], inputs, None, 0.125)

    def limit(layer: int) -> None:
        if new == 1:
            native.read_bytes(k_blocks[layer].data_ptr(), layer_bytes // 2, threads)
            native.read_bytes(v_blocks[layer].data_ptr(), layer_bytes // 2, threads)
        else:
            native.multiply_add(rows * HEADS * DIM * 2 * sum(range(past + 1, present + 1)), threads)

    def sdpa(dtype: torch.dtype) -> Callable[[int], object]:
        some = max(1, min(layers, (1 << 29) // (layer_bytes * dtype.itemsize // 2)))
        keys = torch.randn(some, 2, 1, KV_HEADS, present, DIM).to(dtype)  # one session's; every session of a layer reads it
        queries = torch.randn(1, HEADS, new, DIM).to(dtype)

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
    for _ in range(rounds):
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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backend = CpuBackend(Path.home() / ".cache" / "keypast")
    native = probes()
    print(f"{backend!r}, {arguments.threads} threads, medians of {arguments.rounds} interleaved rounds, ms per layer")
    print(f"{'':16}{'ours':>9}{'limit':>9}{'of limit':>10}{'sdpa fp32':>11}{'sdpa bf16':>11}{'bf16/ours':>11}")
    results = []
    with torch.inference_mode():
        for rows, past, new in [*((r, p, 1) for r, p in DECODE), *((1, 0, n) for n in PREFILL)]:
            r = measure(backend, native, rows, past, new, arguments.rounds, arguments.threads)
            results.append(r)
            print(
                f"{r.name:16}{r.ours:9.4f}{r.limit:9.4f}{r.of_limit:10.2f}{r.sdpa_fp32:11.3f}{r.sdpa_bf16:11.3f}"
                f"{r.sdpa_bf16 / r.ours:11.1f}",
                flush=True,
            )
    print(json.dumps({"isa": backend.kernels.isa, "threads": arguments.threads, "results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
