"""The attention backends, and which of them runs here."""

from collections.abc import Callable
from pathlib import Path

import torch

from engine.attention.base import Backend
from engine.attention.cpu import CpuBackend
from engine.attention.cuda import TritonBackend, TritonUnavailable
from engine.attention.sdpa import SdpaBackend
from engine.errors import InvalidInput
from engine.kernels.build import KernelUnavailable

BACKENDS = ("auto", "cpu", "triton", "sdpa")


def choose(
    name: str,
    device: str,
    cache_dir: Path,
    warn: Callable[[str], None],
    progress: Callable[[str], None] | None = None,
) -> Backend:
    """`auto`: the fastest that the device has, or sdpa with a warning that says why. Raises InvalidInput."""
    if name not in BACKENDS:
        raise InvalidInput("attention_backend", f"must be one of {', '.join(BACKENDS)}, got {name!r}")
    on_cpu = torch.device(device).type == "cpu"
    if name == "sdpa":
        return SdpaBackend()
    if name != "auto" and (name == "cpu") != on_cpu:
        raise InvalidInput("attention_backend", f"{name} does not run on the device {device}; say auto")
    try:
        return CpuBackend(cache_dir, progress=progress) if on_cpu else TritonBackend()
    except (KernelUnavailable, TritonUnavailable) as reason:
        if name != "auto":
            raise InvalidInput("attention_backend", f"{name} is not available: {reason}") from reason
        warn(f"attention runs on the slow path (several times slower): {reason}")
        return SdpaBackend()
