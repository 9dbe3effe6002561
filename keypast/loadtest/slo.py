"""What a service must hold: `ttft.p95=300ms`, `step.p99=50ms`, `errors=0.1%`.

Each objective is checked twice: over the run by its percentile, and, without it, on every single operation. Operations
within all limits that concern them are the goodput.
"""

import re
from collections.abc import Mapping

from pydantic import Field

from keypast.loadtest.scenario import Strict

_OBJECTIVE = re.compile(
    r"(?P<measure>[a-z_]+)(?:\.(?P<at>p\d{1,2}(?:\.\d+)?|mean|max))?=(?P<limit>\d+(?:\.\d+)?)(?P<unit>us|ms|s|%)"
)
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
ERRORS = "errors"
MEASURES = ("turn", "ttft", "inter_token", "prefill", "step", "fork", "create", "delete", "request", "queue", "compute")


class Objective(Strict):
    """`at` is a percentile, or 0 for the mean; `limit` in ms."""

    measure: str
    at: str = "p99"
    limit: float

    def __str__(self) -> str:
        return f"{self.measure}.{self.at} <= {self.limit:g} ms"


class Slo(Strict):
    """`errors`: the share of operations that may fail."""

    objectives: list[Objective] = Field(default_factory=list)
    errors: float = 0

    @classmethod
    def parse(cls, texts: list[str]) -> "Slo":
        """Of several texts, each with one or more objectives and commas between them. Raises ValueError."""
        objectives, errors = [], 0.0
        for part in (part.strip() for text in texts for part in text.split(",")):
            match = _OBJECTIVE.fullmatch(part)
            if match is None or (match["unit"] == "%") != (match["measure"] == ERRORS):
                raise ValueError(f"{part!r} is no objective; write ttft.p95=300ms, step=50ms (p99) or errors=0.1%")
            if match["measure"] == ERRORS:
                errors = float(match["limit"]) / 100
            elif match["measure"] not in MEASURES:
                raise ValueError(f"{match['measure']!r} is not measured; what is: {', '.join(MEASURES)}, errors")
            else:
                limit = float(match["limit"]) * _MS[match["unit"]]
                objectives.append(Objective(measure=match["measure"], at=match["at"] or "p99", limit=limit))
        return cls(objectives=objectives, errors=errors)

    def within(self, values: Mapping[str, float]) -> bool:
        """Whether one operation is, by its values in ms."""
        return all(values.get(each.measure, 0.0) <= each.limit for each in self.objectives)
