"""What this machine, or the container on it, leaves to the process: processors and memory. Linux' control groups, of
either version, say so; where they say nothing there is no limit. And what the process leaves to it."""

import contextlib
import ctypes
import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60


def processors(cgroup: Path = CGROUP) -> int:
    """How many run at a time, at least 1. A container with a quota of 1.5 processors sees all of the machine's, but as
    many threads would be stopped together for most of each period; 2 is what it gets."""
    usable = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()  # version 2
    except (OSError, ValueError):
        quota, period = _read(cgroup / "cpu" / "cpu.cfs_quota_us"), _read(cgroup / "cpu" / "cpu.cfs_period_us")
    if not quota.isdecimal() or not period.isdecimal():  # "max", -1, or there is none
        return usable
    return max(1, min(usable, math.ceil(int(quota) / int(period))))


def host_memory(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that may still be taken."""
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) * 1024, _free_in(cgroup))


def give_back_memory() -> None:
    """What was freed and the C library keeps for later, some 100 MB of loading. Only glibc has a call for it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _free_in(cgroup: Path) -> int:
    memory = cgroup / "memory"
    for limit, used in (
        (_read(cgroup / "memory.max"), _read(cgroup / "memory.current")),  # version 2
        (_read(memory / "memory.limit_in_bytes"), _read(memory / "memory.usage_in_bytes")),
    ):
        if limit.isdecimal() and used.isdecimal():
            return max(0, int(limit) - int(used))
    return UNLIMITED


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
