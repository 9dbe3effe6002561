"""`keypast sessions`: what the service holds, as a person or a script wants to see it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel
from pydantic_core import to_json
from rich.console import Console
from rich.table import Table

from keypast._session import SessionFilter
from keypast._terminal import Commands, Url, advice, complain, console, examples, failed, open_client, size
from keypast.client import Client, Session
from keypast.errors import KeypastError, SessionGone, SessionNotFound
from keypast.past import Past
from keypast.schemas import SessionView
from keypast.wire import WireError

GONE = 3  # exit code
MINTED = 24  # characters of an id that the service gives
STANDARD = "-"  # in place of a file's name

sessions = typer.Typer(
    cls=Commands, rich_markup_mode=None, help="List, look at, delete, fork, export and import sessions."
)

Id = Annotated[str, typer.Argument(metavar="ID", hidden=True)]
Json = Annotated[bool, typer.Option("--json", help="For machines: JSON on one line.")]


@sessions.callback(
    epilog="Exit codes: 0 done, 1 refused or failed, 2 a wrong command line, 3 no such session (any more)."
)
def _sessions() -> None:
    """List, look at, delete, fork, export and import sessions."""


@sessions.command(
    "ls",
    epilog=examples(
        ("keypast sessions ls", ""),
        ("keypast sessions ls --label team=a --state idle", "both must hold"),
        ("keypast sessions ls --json | jq -r '.[].id'", ""),
    ),
)
def list_(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Only this model's.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY[=VALUE]", help="Repeatable; all must hold.")] = None,
    state: Annotated[
        Literal["idle", "running"] | None, typer.Option(metavar="idle|running", help="Only those that are.")
    ] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """List your sessions, oldest first."""
    wanted: SessionFilter = {"limit": 1000}
    if model is not None:
        wanted["model"] = model
    if label:
        wanted["label"] = label
    if state is not None:
        wanted["state"] = state
    with _client(context, url) as client:
        views = [session.view for session in client.sessions.list(**wanted)]
    if json:
        _print_json(views)
    else:
        _print_table(views)


@sessions.command(epilog=examples(("keypast sessions show tour", "")))
def show(context: typer.Context, session_id: Id, json: Json = False, url: Url = None) -> None:
    """Show all that is known of a session."""
    with _client(context, url) as client:
        view = client.sessions.get(session_id).view
    if json:
        _print_json(view)
    else:
        console().print(_card(view))


@sessions.command(epilog=examples(("keypast sessions rm tour draft", "two at once")))
def rm(
    context: typer.Context,
    session_ids: Annotated[list[str], typer.Argument(metavar="ID", hidden=True)],
    json: Json = False,
    url: Url = None,
) -> None:
    """Delete sessions; their memory is free at once. One that is not there does not stop the rest."""
    receipts, codes = [], [0]
    with _client(context, url) as client:
        for session_id in session_ids:
            try:
                receipts.append(client.sessions.delete(session_id))
            except (SessionNotFound, SessionGone) as error:
                complain(f"{session_id}: {error}")
                codes.append(GONE)
    if json:
        _print_json(receipts)
    for receipt in [] if json else receipts:
        shared = f", {receipt.blocks_still_shared} blocks are shared and stay" if receipt.blocks_still_shared else ""
        _say(f"{receipt.id}: {receipt.positions} positions, {size(receipt.bytes)} freed{shared}")
    raise typer.Exit(max(codes))


@sessions.command(
    epilog=examples(
        ("keypast sessions fork tour --count 3", ""),
        ("keypast sessions fork tour --at 12", "as it was at 12 positions"),
    )
)
def fork(
    context: typer.Context,
    session_id: Id,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="How many children.")] = 1,
    at: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Their length; default: the session's own.")
    ] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Fork a session. Its children share its memory until one of them goes on."""
    with _client(context, url) as client:
        children = client.sessions.get(session_id).fork(count, at=at)
    views = [child.view for child in children]
    if json:
        _print_json(views)
    for view in [] if json else views:
        _say(f"{view.id}: {lengths(view.valid_length)} positions, forked from {session_id}")


@sessions.command(
    "export",
    epilog=examples(
        ("keypast sessions export tour tour.safetensors", ""),
        ("keypast sessions export tour - | ssh other keypast sessions import -", ""),
    ),
)
def export(
    context: typer.Context,
    session_id: Id,
    file: Annotated[str, typer.Argument(metavar="FILE", hidden=True)],
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    json: Json = False,
    url: Url = None,
) -> None:
    """Write a session's keys and values to a file. - is the standard output. The session stays as it is."""
    if file != STANDARD and Path(file).exists() and not force:
        raise failed(f"{file} is there already; --force writes over it")
    with _client(context, url) as client:
        past = client.sessions.get(session_id).past()
    if file == STANDARD:
        sys.stdout.buffer.writelines(past.parts())
        return
    with _files():
        past.save(file)
    told = {"file": file, "bytes": Path(file).stat().st_size, "valid_length": past.valid_length, "digest": past.digest}
    if json:
        _print_json(told)
    else:
        _say(f"{file}: {lengths(past.valid_length)} positions, {size(int(told['bytes']))}")  # type: ignore[call-overload]


@sessions.command(
    "import",
    epilog=examples(
        ("keypast sessions import tour.safetensors", ""), ("keypast sessions import tour.safetensors --id tour-2", "")
    ),
)
def import_(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", hidden=True)],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the loaded model that the file is of.")
    ] = None,
    session_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="The new session's id; default: a new one.")
    ] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Make a new session of a file that export wrote. - is the standard input."""
    with _files():
        past = Past.from_bytes(sys.stdin.buffer.read()) if file == STANDARD else Past.load(file)
    with _client(context, url) as client:
        session = _loaded(client, past, model or _model_of(client, past), session_id)
    if json:
        _print_json(session.view)
    else:
        _say(f"{session.id}: {lengths(session.valid_length)} positions, {size(session.view.bytes)}")


# ---- as it is shown -------------------------------------------------------------------------------------------------


def lengths(rows: list[int]) -> str:
    """`5`, `5+3`, and `8 × 5 to 40` where they are many."""
    if len(rows) <= 3:
        return "+".join(map(str, rows))
    low, high = min(rows), max(rows)
    return f"{len(rows)} × {low} to {high}" if low < high else f"{len(rows)} × {low}"


def since(then: datetime, now: datetime) -> str:
    """How long from one to the other: `3 s`, `12 min`, `5 h`, `9 d`."""
    seconds = max(0, round((now - then).total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _print_table(views: list[SessionView]) -> None:
    now = datetime.now(UTC)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    longest = max((len(view.id) for view in views), default=0)
    table.add_column("id", overflow="fold", min_width=min(longest, MINTED))  # whole: it is for copying
    for name in ("model", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("length", "size", "used", "ends"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("labels", overflow="ellipsis")
    for view in views:
        table.add_row(
            view.id,
            view.model,
            view.state,
            lengths(view.valid_length),
            size(view.bytes),
            f"{since(view.last_used_at, now)} ago",
            _end(view, now),
            _labels(view),
        )
    console().print(table)


def _card(view: SessionView) -> Table:
    now = datetime.now(UTC)
    card = Table.grid(padding=(0, 2))
    shared = f", {view.shared_blocks} shared" if view.shared_blocks else ""
    lines = {
        "id": view.id,
        "model": f"{view.model} ({view.kind})",
        "state": view.state,
        "length": f"{lengths(view.valid_length)} of {view.max_length}",
        "version": str(view.version),
        "memory": f"{size(view.bytes)} in {view.blocks} blocks{shared}",
        "parent": view.parent or "",
        "labels": _labels(view),
        "created": f"{view.created_at:%Y-%m-%d %H:%M:%S} UTC, {since(view.created_at, now)} ago",
        "used": f"{view.last_used_at:%Y-%m-%d %H:%M:%S} UTC, {since(view.last_used_at, now)} ago",
        "ends": _end(view, now),
    }
    for name, text in lines.items():
        if text:
            card.add_row(name, text)
    return card


def _end(view: SessionView, now: datetime) -> str:
    if view.pinned:
        return "pinned"
    return "never" if view.expires_at is None else f"in {since(now, view.expires_at)}"


def _labels(view: SessionView) -> str:
    """What a terminal would act upon is shown as a question mark."""
    text = " ".join(f"{key}={value}" if value else key for key, value in view.labels.items())
    return "".join(character if character.isprintable() else "?" for character in text)


def _say(text: str) -> None:
    """Never cut or folded: it may be read by a script."""
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


def _print_json(told: BaseModel | list[Any] | dict[str, Any]) -> None:
    sys.stdout.write(to_json(told).decode() + "\n")


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@contextmanager
def _client(context: typer.Context, url: str | None) -> Iterator[Client]:
    """What goes wrong with it ends the command in one line."""
    try:
        with open_client(context, url) as client:
            yield client
    except (SessionNotFound, SessionGone) as error:
        raise failed(str(error), GONE) from None
    except KeypastError as error:
        raise failed(advice(error)) from None


@contextmanager
def _files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise failed(f"{error.filename}: {error.strerror}") from None
    except WireError as error:
        raise failed(f"the file is not a past that can be read: {error}") from None


def _model_of(client: Client, past: Past) -> str:
    cards = client.models()
    for card in cards:
        if (card.kind, card.fingerprint) == (past.kind, past.fingerprint):
            return card.id
    loaded = ", ".join(card.id for card in cards)
    raise failed(f"the file is of another model than those that are loaded ({loaded})")


def _loaded(client: Client, past: Past, model: str, session_id: str | None) -> Session:
    """A new session with the past, or none."""
    options: dict[str, Any] = {} if session_id is None else {"id": session_id}
    session = client.sessions.create(model, batch_size=len(past.valid_length), **options)
    try:
        session.load_past(past)
    except KeypastError:
        with suppress(KeypastError):
            session.delete()
        raise
    return session
