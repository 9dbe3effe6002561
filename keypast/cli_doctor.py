"""`keypast doctor`: whether all is well here, and what to do where it is not."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from json import dumps
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from keypast._terminal import Connect, Url, advice, console, examples
from keypast.client import Client
from keypast.doctor import Finding, Report
from keypast.errors import ConnectFailed, KeypastError

_SHOWN = {"ok": Text("ok", "green"), "note": Text("look", "yellow"), "bad": Text("bad", "red")}

EPILOG = examples(
    ("keypast doctor", "before the first start, or when something is slow"),
    ("keypast doctor --json", "for a script; the numbers, too"),
    closing="Exit codes: 0 it will work, 1 something is bad.",
)


def _examine() -> Report:
    report: Report = import_module("service.doctor").examine()
    return report


@dataclass(frozen=True, slots=True)
class Around:
    """What a context's `obj` holds in place of the machine and of Client."""

    examine: Callable[[], Report] = _examine
    connect: Connect = Client


def doctor(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="For machines: JSON on one line.")] = False,
    url: Url = None,
) -> None:
    """Say whether all is well here, and what to do where it is not. Looks at device, kernels, memory, port, service."""
    around: Around = context.obj or Around()
    here = _here(around.examine)
    report = Report([*here.findings, _service(around.connect, url)], here.numbers)
    if json:
        sys.stdout.write(dumps(report.json()) + "\n")
    else:
        console().print(table(report))
    raise typer.Exit(0 if report.ok else 1)


def table(report: Report) -> Table:
    """As a person reads it: what is to be done stands below what was found."""
    shown = Table.grid(padding=(0, 2))
    for finding in report.findings:
        shown.add_row(_SHOWN[finding.state], finding.name, Text(finding.found))
        if finding.fix:
            shown.add_row("", "", Text(f"→ {finding.fix}", style="bold"))
    return shown


def _here(examine: Callable[[], Report]) -> Report:
    """This machine, if it could serve."""
    try:
        return examine()
    except ModuleNotFoundError as error:
        fix = "pip install 'keypast[server]', if this machine is to serve"
        return Report([Finding("serving", "note", f"{error.name} is not installed: this is a client only", fix)])


def _service(connect: Connect, url: str | None) -> Finding:
    try:
        with connect(url) as client:
            names = ", ".join(card.id for card in client.models())
            return Finding("service", "ok", f"keypast {client.version()} answers, with {names}")
    except ConnectFailed as error:
        return Finding("service", "note", str(error), "start it with `keypast serve`, or give its --url")
    except KeypastError as error:
        return Finding("service", "note", advice(error))
    except ValueError as error:
        return Finding("service", "bad", str(error), "give an --url, or set KEYPAST_URL")
