"""The attention backends, and which of them runs here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.attention.base import Backend
from engine.attention.cpu import CpuBackend
from engine.attention.cuda import TritonBackend, TritonUnavailable
from engine.attention.flashinfer import FlashInferBackend, fastest, installed
from engine.attention.sdpa import SdpaBackend
from engine.attention.timing import step_seconds, try_out
from engine.errors import InvalidInput
from engine.kernels.build import KernelUnavailable

BACKENDS = ("auto", "cpu", "triton", "flashinfer", "sdpa")


def choose(
    name: str,
    device: str,
    cache_dir: Path,
    warn: Callable[[str], None],
    progress: Callable[[str], None] | None = None,
    recorded: bool = False,
    flashinfer: Callable[[], Any] = installed,
    seconds: Callable[[Backend], float] = step_seconds,
    tried: Callable[[Backend, str], None] = try_out,
) -> Backend:
    """`auto`: the fastest that the device has, or sdpa with a warning that says why. Raises InvalidInput.

    `recorded`: steps will be, which saves more than one kernel has over another, so `auto` is one that can be.
    `flashinfer` gives that library, or None; `seconds` times a backend, where a GPU has more than one; `tried` raises
    what keeps a backend from running there."""
    if name not in BACKENDS:
        raise InvalidInput("attention_backend", f"must be one of {', '.join(BACKENDS)}, got {name!r}")
    on_cpu = torch.device(device).type == "cpu"
    if name == "sdpa":
        return SdpaBackend()
    if name != "auto" and (name == "cpu") != on_cpu:
        raise InvalidInput("attention_backend", f"{name} does not run on the device {device}; say auto")
    try:
        if on_cpu:
            return CpuBackend(cache_dir, progress=progress)
        return _on_gpu(name, _triton(device, tried), warn, recorded, flashinfer, seconds)
    except (KernelUnavailable, TritonUnavailable) as reason:
        if name != "auto":
            raise InvalidInput("attention_backend", f"{name} is not available: {reason}") from reason
        warn(f"attention runs on the slow path (several times slower): {reason}")
        return SdpaBackend()


def _triton(device: str, tried: Callable[[Backend, str], None]) -> TritonBackend:
    """Raises TritonUnavailable: it may be installed, and lack the C compiler that it makes its launchers with."""
    backend = TritonBackend()
    try:
        tried(backend, device)
    except Exception as error:
        raise TritonUnavailable(f"its kernels do not run here ({type(error).__name__}: {error})") from error
    return backend


def _on_gpu(
    name: str,
    ours: TritonBackend,
    warn: Callable[[str], None],
    recorded: bool,
    flashinfer: Callable[[], Any],
    seconds: Callable[[Backend], float],
) -> Backend:
    """Raises InvalidInput."""
    library = None if name == "triton" or (name == "auto" and recorded) else flashinfer()
    if library is None:
        if name == "flashinfer":
            raise InvalidInput("attention_backend", "flashinfer is not installed: pip install 'keypast[flashinfer]'")
        return ours
    if name == "flashinfer":
        return FlashInferBackend(library)
    return fastest([ours, FlashInferBackend(library)], seconds, warn)
