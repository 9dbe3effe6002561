"""What the GPU benchmarks share: whether there is one, how long it takes, and how fast it copies."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.graphs import CudaGraphs, GraphDevice

ROUNDS = 7


class NoGpu(Exception):
    """torch sees none, or Triton would not use it; the message says which."""


class Gpu:
    """torch's current device. Raises NoGpu."""

    device = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            if torch.version.cuda is None:
                built = f"torch {torch.__version__} is built without CUDA"
            raise NoGpu(f"there is no GPU here that torch can use ({built}); nothing was measured")
        if os.environ.get("TRITON_INTERPRET", "0") != "0":
            raise NoGpu("TRITON_INTERPRET is set, so kernels would run on the CPU; unset it")
        self.name = torch.cuda.get_device_name()

    def milliseconds(self, calls: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> float:
        """Median over rounds of one call's time on the device. A round makes every call once; they should be of tensors
        of their own, more of them than fit into the device's cache. What the host does is not in it, where it keeps
        ahead."""
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

    def wall_milliseconds(self, call: Callable[[], object], times: int = 20, rounds: int = ROUNDS) -> float:
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

    def recorded(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a graph, so that many short kernels are timed without the host between them."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        return graph.replay

    def compiled(self, function: Any) -> Any:
        return torch.compile(function, dynamic=False)

    def copy_bandwidth(self, size: int = 2 << 30) -> float:
        """Bytes a second, those read and those written, of a copy within the device: what a kernel may hope for."""
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        rate: float = 2 * size / self.milliseconds([lambda: target.copy_(source)] * 3) * 1e3
        return rate

    def free(self) -> int:
        """Bytes."""
        free: int = torch.cuda.mem_get_info()[0]
        return free

    def release(self) -> None:
        torch.cuda.empty_cache()

    def graphs(self) -> GraphDevice:
        return CudaGraphs()


class DryRun(Gpu):
    """None, on the CPU and in Triton's interpreter: that everything runs, and nothing of how fast. Raises NoGpu."""

    device = "cpu"

    def __init__(self) -> None:
        self.name = "dry run, no GPU"
        if os.environ.get("TRITON_INTERPRET", "0") == "0":
            raise NoGpu("a dry run is one in Triton's interpreter: set TRITON_INTERPRET=1")

    def milliseconds(self, calls: Sequence[Callable[[], object]], rounds: int = 1) -> float:
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls) * 1e3

    def wall_milliseconds(self, call: Callable[[], object], times: int = 1, rounds: int = 1) -> float:
        return self.milliseconds([call])

    def recorded(self, call: Callable[[], object]) -> Callable[[], object]:
        return call

    def compiled(self, function: Any) -> Any:
        return function

    def copy_bandwidth(self, size: int = 1 << 20) -> float:
        return super().copy_bandwidth(size)

    def free(self) -> int:
        return 1 << 30

    def release(self) -> None:
        pass

    def graphs(self) -> GraphDevice:
        from tests.engine.fake_device import FakeDevice

        return FakeDevice()
