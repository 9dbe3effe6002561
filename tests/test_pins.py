"""All that `pip install keypast[server,loadtest,otel,dev]` brings is pinned."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
TORCH = "torch"  # the wheel decides which of its own it brings


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def asked() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["server"], *extras["loadtest"], *extras["otel"], *extras["dev"]]


def asked_by(name: str) -> list[str]:
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return []  # no wheel of it is for this machine


def needed(requires: list[str], extras: set[str], seen: set[str]) -> Iterator[str]:
    """Names of what is asked for here, and of what that asks for."""
    for requirement in map(Requirement, requires):
        where = [{"extra": extra} for extra in extras or {""}]
        other = canonicalize_name(requirement.name)
        if (requirement.marker and not any(map(requirement.marker.evaluate, where))) or other in seen:
            continue
        seen.add(other)
        yield other
        if other != TORCH:
            yield from needed(asked_by(other), requirement.extras, seen)


def test_all_that_is_installed_is_pinned() -> None:
    pinned, found = pins(), set(needed(asked(), set(), set()))
    assert len(found) > 50
    assert found <= pinned.keys(), "write them into constraints.txt"
