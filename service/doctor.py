"""Whether the service can run here, and how well: looked at first, judged then."""

import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from keypast._machine import processor
from keypast.doctor import Finding, Report
from service.loader import free_memory, on_gpu
from service.settings import Settings, SettingsError, parse_memory, read_settings

_CPU_SIDE, _GPU_SIDE = 512, 4096  # of the square matrices that are multiplied to see how fast a dtype is
_READ_BYTES = 128 << 20
_LEAST_DISK = 1 << 30  # a small model, converted
_ENOUGH = 0.1  # seconds of one measurement
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is. Sizes in bytes, `rates` in GFLOP/s, `read` in GB/s."""

    python: str
    torch: str
    device: str
    gpu: bool
    rates: Mapping[str, float]
    read: float
    kernels: str  # the instruction set they were loaded with; empty: they are not there
    kernels_fault: str  # why not
    memory: int
    disk: int
    port_free: bool


def examine(environment: Mapping[str, str] = os.environ, look: Callable[[Settings], Facts] | None = None) -> Report:
    """Reads the settings, looks at the machine and says what is to be done. Takes a second or two."""
    try:
        settings = read_settings(environment)
    except SettingsError as error:
        return Report([Finding("settings", "bad", str(error), "correct it; docs/configuration.md lists every setting")])
    facts = (look or look_around)(settings)
    numbers = {f"{name}_gflops": round(rate, 1) for name, rate in facts.rates.items()}
    numbers |= {"read_gbs": round(facts.read, 1), "memory_bytes": facts.memory, "disk_bytes": facts.disk}
    return Report(judge(facts, settings), numbers)


def judge(facts: Facts, settings: Settings) -> list[Finding]:
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in facts.rates.items())
    kept = parse_memory(settings.kv_memory, facts.memory)
    return [
        Finding("settings", "ok", f"{', '.join(settings.models)} on {settings.host}:{settings.port}"),
        Finding("python", "ok", f"{facts.python}, torch {facts.torch}"),
        _device(facts, settings),
        Finding("speed", "ok", f"GFLOP/s of torch's products: {rates}; memory is read at {facts.read:.0f} GB/s"),
        _kernels(facts),
        _memory(facts, settings, kept),
        _disk(facts, settings),
        _port(facts, settings),
    ]


def _device(facts: Facts, settings: Settings) -> Finding:
    if settings.device == "cuda" and not facts.gpu:
        return Finding(
            "device", "bad", "KEYPAST_DEVICE=cuda, and torch sees no GPU", "KEYPAST_DEVICE=auto, or a torch with CUDA"
        )
    return Finding("device", "ok", facts.device)


def _kernels(facts: Facts) -> Finding:
    if facts.gpu:
        return Finding("kernels", "ok", "Triton compiles them at the first start")
    if facts.kernels:
        return Finding("kernels", "ok", f"built, {facts.kernels}")
    return Finding(
        "kernels", "note", facts.kernels_fault, "python -m engine.kernels.build (needs g++); without them all is slow"
    )


def _memory(facts: Facts, settings: Settings, kept: int) -> Finding:
    found = f"{_size(facts.memory)} free, {_size(kept)} of it for keys and values"
    if kept > facts.memory:
        return Finding("memory", "bad", found, "give a smaller KEYPAST_KV_MEMORY, or a share: 25%")
    if kept > 0.8 * facts.memory:
        return Finding("memory", "note", found, "little is left for the models; give a smaller KEYPAST_KV_MEMORY")
    return Finding("memory", "ok", found)


def _disk(facts: Facts, settings: Settings) -> Finding:
    found = f"{_size(facts.disk)} free for {settings.cache_dir}"
    if facts.disk < _LEAST_DISK:
        return Finding("disk", "note", found, "models are kept there; free some, or set KEYPAST_CACHE_DIR")
    return Finding("disk", "ok", found)


def _port(facts: Facts, settings: Settings) -> Finding:
    if facts.port_free:
        return Finding("port", "ok", f"{settings.port} is free")
    return Finding(
        "port", "note", f"{settings.port} is taken", "if not by this service: KEYPAST_PORT, or --port 0 for a free one"
    )


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


# ---- the machine ----------------------------------------------------------------------------------------------------


def look_around(settings: Settings) -> Facts:
    """Loads torch, multiplies and reads for some tenths of a second, opens the port for a moment; builds nothing."""
    import torch

    gpu = on_gpu("auto") and settings.device != "cpu"
    cache = settings.cache_dir.expanduser()
    kernels, fault = ("", "") if gpu else _built(cache)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    return Facts(
        python=platform.python_version(),
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if gpu else f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        gpu=gpu,
        rates={name: _rate(name, gpu) for name in ("float32", "bfloat16", "float16")},
        read=_read_rate(gpu),
        kernels=kernels,
        kernels_fault=fault,
        memory=free_memory("cuda" if gpu else "cpu"),
        disk=shutil.disk_usage(there).free,
        port_free=_is_free(settings.host, settings.port),
    )


def _built(cache: Path) -> tuple[str, str]:
    """The kernels' instruction set, or why there are none."""
    from engine.kernels.build import KernelUnavailable, find, load

    if not find(cache).exists():
        compiler = "g++ is there" if shutil.which("g++") else "there is no g++: apt-get install g++"
        return "", f"not built yet; {compiler}"
    try:
        return load(cache).isa, ""
    except KernelUnavailable as error:
        return "", str(error)


def _rate(dtype: str, gpu: bool) -> float:
    """GFLOP/s of a product of two square matrices."""
    import torch

    side = _GPU_SIDE if gpu else _CPU_SIDE
    left = torch.ones(side, side, dtype=getattr(torch, dtype), device="cuda" if gpu else "cpu")
    return 2 * side**3 / _best(lambda: left @ left, gpu) / _GB


def _read_rate(gpu: bool) -> float:
    """GB/s of a sum over what no cache holds."""
    import torch

    numbers = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device="cuda" if gpu else "cpu")
    return _READ_BYTES / _best(numbers.sum, gpu) / _GB


def _best(work: Callable[[], object], gpu: bool) -> float:
    """Seconds, the least of some rounds; of fewer where one takes long."""
    import torch

    least, end = float("inf"), time.perf_counter() + _ENOUGH
    while least == float("inf") or (time.perf_counter() < end and least < _ENOUGH / 4):
        started = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - started)
    return least


def _is_free(host: str, port: int) -> bool:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError:
        return False
    return True
