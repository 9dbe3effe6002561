"""What starting a model asks of the device that it is alone on: how much memory there is, and what a pass takes."""

from collections.abc import Callable
from typing import Protocol

import torch

from engine.graphs import CudaGraphs, GraphDevice


class Gpu(Protocol):
    def free(self) -> int:
        """Bytes that nobody holds."""
        ...

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that `run` holds at most, beside those held before it; nothing of it is held afterwards."""
        ...

    def graphs(self) -> GraphDevice: ...


class CudaGpu:
    """torch's current device."""

    def free(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info()[0]
        return free

    def peak(self, run: Callable[[], object]) -> int:
        run()  # kernels are compiled and libraries take their workspaces, which stay
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graphs(self) -> GraphDevice:
        return CudaGraphs()
