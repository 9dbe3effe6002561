"""The attention backends, and which of them runs here."""

from collections.abc import Callable
from pathlib import Path

from engine.attention.base import Backend
from engine.attention.cpu import CpuBackend
from engine.attention.sdpa import SdpaBackend
from engine.errors import InvalidInput
from engine.kernels.build import KernelUnavailable

BACKENDS = ("auto", "cpu", "sdpa")


def choose(
    name: str,
    device: str,
    cache_dir: Path,
    warn: Callable[[str], None],
    progress: Callable[[str], None] | None = None,
) -> Backend:
    """`auto`: the native kernels on a CPU that can build or has them, else sdpa with a warning that says why."""
    if name not in BACKENDS:
        raise InvalidInput("attention_backend", f"must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "sdpa" or (name == "auto" and device != "cpu"):
        return SdpaBackend()
    try:
        return CpuBackend(cache_dir, progress=progress)
    except KernelUnavailable as reason:
        if name == "cpu":
            raise InvalidInput("attention_backend", f"the native kernels are not available: {reason}") from reason
        warn(f"attention runs on the slow path (several times slower): {reason}")
        return SdpaBackend()
