"""Requests as they were answered: how many, how long, with which problems. Counted on the event loop, a microsecond a
request; may be read on any thread.

No label is a client's to choose: a path counts by its route's template, a method that HTTP does not know as one.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from starlette.types import Scope

from engine.tally import Histogram
from keypast.schemas import Code

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
OTHER = "_OTHER"  # OpenTelemetry's name for any other method
NO_ROUTE = "none"  # refused before a route was looked for, or there is none, or it is one of the documents'


class Answered(NamedTuple):
    method: str
    route: str
    status: int


class Traffic:
    def __init__(self) -> None:
        self.active = 0
        self._problems: Counter[str] = Counter()
        self._seconds: dict[Answered, Histogram] = {}

    def began(self) -> None:
        self.active += 1

    def ended(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        self.active -= 1
        route = getattr(scope.get("route"), "path", NO_ROUTE)
        answered = Answered(method if method in METHODS else OTHER, route, status)
        times = self._seconds.get(answered)
        if times is None:
            times = self._seconds[answered] = Histogram()
        times.add(seconds)
        for code in scope["state"].get("problems", ()):
            self._problems[code] += 1

    def refused(self, code: Code) -> None:
        """On a connection, before it was a request."""
        self._problems[code] += 1

    def requests(self) -> Iterator[tuple[Answered, Histogram]]:
        return iter(list(self._seconds.items()))

    def problems(self) -> dict[str, int]:
        """How many of each code were told to clients, all codes."""
        return {code.value: self._problems[code] for code in Code}
