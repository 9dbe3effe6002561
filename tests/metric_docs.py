"""The metrics that docs/operations.md names."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_ROW = re.compile(r"^\| `(\w+)` \| (histogram|gauge|counter) \|([^|]*)\|", re.MULTILINE)


@dataclass(frozen=True)
class Documented:
    kind: str
    labels: frozenset[str]


def documented() -> dict[str, Documented]:
    rows = _ROW.findall((ROOT / "docs" / "operations.md").read_text())
    return {name: Documented(kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
