"""What a container leaves to the process, read from control groups as the two versions of them write it."""

import os
from pathlib import Path

import pytest

from service.host import host_memory, processors

HERE = len(os.sched_getaffinity(0))
MEMINFO = "MemTotal:       24000000 kB\nMemFree:  300 kB\nMemAvailable:    1000000 kB\n"
NO_LIMIT = 9223372036854771712  # version 1 has no word for it


def group(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, HERE),
        ({"cpu.max": "max 100000"}, HERE),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "150000 100000"}, min(HERE, 2)),
        ({"cpu.max": "99900000 100000"}, HERE),
        ({"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, HERE),
        ({"cpu/cpu.cfs_quota_us": 20000, "cpu/cpu.cfs_period_us": 100000}, 1),
    ],
)
def test_no_more_threads_than_the_quota_lets_run(tmp_path: Path, files: dict[str, object], expected: int) -> None:
    assert processors(group(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000000 * 1024),
        ({"memory.max": "max", "memory.current": 5}, 1000000 * 1024),
        ({"memory.max": 1000, "memory.current": 400}, 600),
        ({"memory.max": 1000, "memory.current": 1100}, 0),
        ({"memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": 9}, 1000000 * 1024),
        ({"memory/memory.limit_in_bytes": 700, "memory/memory.usage_in_bytes": 100}, 600),
    ],
)
def test_free_is_what_machine_and_limit_leave(tmp_path: Path, files: dict[str, object], expected: int) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert host_memory(group(tmp_path / "group", files), tmp_path / "meminfo") == expected
