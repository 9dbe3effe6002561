"""Processes of this machine, by their ids."""

from pathlib import Path


def children(pid: int, command: str = "") -> list[int]:
    """Those that the process has started itself and that have not ended; with `command` in their command line."""
    own = [child for child, (parent, state) in _all().items() if parent == pid and state != "Z"]
    return [child for child in own if command in Path(f"/proc/{child}/cmdline").read_text()]


def runs(pid: int) -> bool:
    return pid in _all() and _all()[pid][1] != "Z"


def _all() -> dict[int, tuple[int, str]]:
    """The parent and the state of each process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has ended meanwhile
        found[int(path.parent.name)] = int(parent), state
    return found
