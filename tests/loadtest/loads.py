"""Plans with what a test leaves out."""

from typing import Any

from keypast.loadtest.plan import ModelInfo, Plan

MODEL = ModelInfo.named("m")


def plan(url: str = "http://fake", visit: dict[str, Any] | None = None, **settings: Any) -> Plan:
    """One visit at a time, of plain requests, for a second, unless it is told otherwise."""
    known = {
        "target": "openai",
        "url": url,
        "scenario": {"name": "test", "visits": [visit or {"kind": "request", "path": "/"}]},
        "models": [MODEL],
        "arrival": {"concurrency": 1},
        "seconds": 1.0,
        "interval": 0.25,
    }
    return Plan.model_validate({**known, **settings})


def counted(visits: int, visit: dict[str, Any] | None = None, **settings: Any) -> Plan:
    return plan(visit=visit, count=visits, seconds=1e6, **settings)
