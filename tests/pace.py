"""Which of many cases the fast suite runs; the slow one runs the rest."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """The values as parameters of a test, all of them slow but the `fast` ones. Raises ValueError: one is not there."""
    listed = list(values)
    if missing := [value for value in fast if value not in listed]:
        raise ValueError(f"there is no {missing}")
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in listed]
