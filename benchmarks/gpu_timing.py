"""What the GPU benchmarks share: whether there is one, how long it takes, and how fast it copies."""

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 7


class NoGpu(Exception):
    """torch sees none, or Triton would not use it; the message says which."""


def device_name() -> str:
    """Raises NoGpu."""
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        if torch.version.cuda is None:
            built = f"torch {torch.__version__} is built without CUDA"
        raise NoGpu(f"there is no GPU here that torch can use ({built}); nothing was measured")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise NoGpu("TRITON_INTERPRET is set, so kernels would run on the CPU; unset it")
    return torch.cuda.get_device_name()


def milliseconds(calls: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> float:
    """Median over rounds of one call's time on the device. A round makes every call once; they should be of tensors of
    their own, more of them than fit into the device's cache. What the host does is not in it, where it keeps ahead."""
    for call in calls:
        call()
    times: list[float] = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def wall_milliseconds(call: Callable[[], object], times: int = 20, rounds: int = ROUNDS) -> float:
    """Median over rounds of one call's time on the host's clock, the device's work and the wait for it included."""
    call()
    measured = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            call()
        torch.cuda.synchronize()
        measured.append((time.perf_counter() - started) / times * 1e3)
    return statistics.median(measured)


def recorded(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a graph, so that many short kernels are timed without the host between them."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bandwidth(size: int = 2 << 30) -> float:
    """Bytes a second, those read and those written, of a copy within the device: what a kernel may hope for."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rate: float = 2 * size / milliseconds([lambda: target.copy_(source)] * 3) * 1e3
    return rate
