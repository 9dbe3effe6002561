"""What `keypast doctor` finds: data, so that a machine can read it, too."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["ok", "note", "bad"]  # nothing to do; worth a look; it will not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, what it is, and, if something is to be done, what."""

    name: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Findings, and the plain numbers that some of them are made of: bytes, GFLOP/s, GB/s."""

    findings: list[Finding]
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is bad."""
        return all(finding.state != "bad" for finding in self.findings)

    def json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}
