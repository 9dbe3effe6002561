"""`keypast keys`: the file of API keys that a service reads (KEYPAST_KEYS_FILE)."""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from keypast._terminal import WRONG, Commands, console, examples, failed, listing
from keypast.keys import KeyRecord, KeysError, Role, new_key, read_keys, write_keys

keys = typer.Typer(
    cls=Commands, rich_markup_mode=None, help="API keys: make, list and remove them. A running service follows."
)

File = Annotated[
    Path,
    typer.Option(
        "--file", envvar="KEYPAST_KEYS_FILE", dir_okay=False, metavar="FILE", help="The service's file of keys."
    ),
]


@keys.command(
    epilog=examples(
        ("keypast keys new alice --file keys.txt", "prints the key, this once"),
        ("keypast keys new prometheus --role metrics --file keys.txt --days 90", ""),
    )
)
def new(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", hidden=True)],
    file: File,
    role: Annotated[
        Role,
        typer.Option(
            metavar="ROLE",
            help="user; admin may also drain, check, list all sessions, read metrics; metrics may read those alone.",
        ),
    ] = "user",
    days: Annotated[
        float | None, typer.Option(min=0, metavar="N", help="It ends after so many; default: never.")
    ] = None,
) -> None:
    """Make a key to a tenant's sessions and print it, this once. The file keeps only its salted hash."""
    known = _read(file, missing_ok=True)
    try:
        key, record = new_key(tenant, role, days)
    except KeysError as error:
        raise failed(str(error), WRONG) from None
    _write(file, [*known, record])
    sys.stdout.write(f"{key}\n")
    note = f"{role} of {tenant}, id {record.id}; not shown again. Clients take it from KEYPAST_API_KEY"
    Console(stderr=True, soft_wrap=True).print(note, markup=False, highlight=False)


@keys.command(epilog=examples(("keypast keys ls --file keys.txt", "")))
def ls(file: File) -> None:
    """List the keys by their ids; the keys themselves are not known."""
    table = listing("id", "tenant", "role", "ends")
    for record in _read(file):
        table.add_row(record.id, record.tenant, record.role, _end(record))
    console().print(table)


@keys.command(epilog=examples(("keypast keys rm 3f9c2a --file keys.txt", "an id that `keypast keys ls` shows")))
def rm(key_id: Annotated[str, typer.Argument(metavar="ID", hidden=True)], file: File) -> None:
    """Remove a key; a running service refuses it within a second or two."""
    known = _read(file)
    rest = [record for record in known if record.id != key_id]
    if len(rest) == len(known):
        raise failed(f"no key has the id {key_id!r}; `keypast keys ls` lists them")
    _write(file, rest)


def _end(record: KeyRecord) -> str:
    if record.ends is None:
        return "never"
    return f"{datetime.fromtimestamp(record.ends, UTC):%Y-%m-%d %H:%M}Z{' (over)' * record.ended(time.time())}"


def _read(file: Path, *, missing_ok: bool = False) -> list[KeyRecord]:
    try:
        return list(read_keys(file).values())
    except FileNotFoundError:
        if missing_ok:
            return []
        raise failed(f"{file} is not there; `keypast keys new` makes it") from None
    except (OSError, KeysError) as error:
        raise failed(f"{file}: {error}") from None


def _write(file: Path, records: list[KeyRecord]) -> None:
    try:
        write_keys(file, records)
    except OSError as error:
        raise failed(f"cannot write {file}: {error.strerror or error}") from None
