"""docs/configuration.md, of `service.settings`."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from engine.config import Quota
from service.settings import PREFIX, Settings

# A section begins with this setting and goes on to the next one's.
SECTIONS = {
    "host": "Who may come in",
    "models": "Models and the device",
    "kv_memory": "Blocks, batches, waiting",
    "quota": "Tenants and the end of a session",
    "event_ring": "Events",
    "prefix_reuse": "OpenAI's clients and Triton's",
    "max_batch_items": "Bounds on requests",
    "log_format": "The log and traces",
}
_HEAD = """\
# Configuration

Every setting of the service. It is read from the environment once, at start: `KEYPAST_PORT=9000` sets `port`; upper or
lower case is the same. `keypast serve` has options for the common ones (`--port 9000`), which go before the
environment. A wrong value ends the start with a line that names it and what it should be. This page is written by
`make reference` from `service/settings.py`.

Two names are read by clients and not by the service: `KEYPAST_URL` is where it is (default `http://127.0.0.1:8000`),
`KEYPAST_API_KEY` the key they send.

A size in bytes is a plain number; only `KEYPAST_KV_MEMORY` takes units. A time is in seconds. A switch is `true` or
`false`.
"""


def page() -> str:
    """The whole of docs/configuration.md."""
    lines = [_HEAD]
    for name, field in Settings.model_fields.items():
        if name in SECTIONS:
            lines.append(f"\n## {SECTIONS[name]}\n".removeprefix("\n" * (len(lines) == 1)))
            lines += ["| environment | default | takes | meaning |", "| --- | --- | --- | --- |"]
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{PREFIX}{name.upper()}` | {_default(field.default)} | {_takes(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    match value:
        case None:
            return "not set"
        case "":
            return "empty"
        case bool():
            return f"`{str(value).lower()}`"
        case Quota():
            given = {name: number for name, number in dataclasses.asdict(value).items() if number}
            return f"`{json.dumps(given)}`" if given else "no bound"
        case {}:
            return " ".join(f"`{name}={spec}`" for name, spec in value.items()) or "none"
        case int() if value >= 1 << 30:
            return f"`{value}` ({value >> 30} GiB)"
        case int() if value >= 1 << 20:
            return f"`{value}` ({value >> 20} MiB)"
        case _:
            return f"`{value}`"


def _takes(field: FieldInfo) -> str:
    wanted = field.annotation
    if get_origin(wanted) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(wanted))
    if get_origin(wanted) in (types.UnionType,):
        wanted = next(each for each in get_args(wanted) if each is not type(None))
    if wanted is bool:
        return "`true`, `false`"
    if wanted is Path:
        return "a path"
    if wanted in (int, float):
        return " ".join(["a number", *_bounds(field)])
    return "text" if wanted is str else "see there"


def _bounds(field: FieldInfo) -> list[str]:
    told = []
    for bound in field.metadata:
        match bound:
            case Ge(low):
                told.append(f"≥ {low}")
            case Gt(low):
                told.append(f"> {low}")
            case Le(high):
                told.append(f"≤ {high}")
            case Lt(high):
                told.append(f"< {high}")
    return told
