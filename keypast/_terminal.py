"""What the commands share: a client from the context, one line for an error, a console that cuts only terminals."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from keypast.client import Client
from keypast.errors import ConnectFailed, Denied, KeypastError, ModelNotFound, Refused

Connect = Callable[[str | None], Client]  # what a context's `obj` holds in place of Client
Url = Annotated[str | None, typer.Option(help="The service's address; default: KEYPAST_URL, else the local one.")]


def open_client(context: typer.Context, url: str | None) -> Client:
    connect: Connect = context.obj or Client
    try:
        return connect(url)
    except ValueError as error:
        raise failed(str(error)) from None


def advice(error: KeypastError) -> str:
    """One line: what went wrong and what to do about it."""
    if isinstance(error, ConnectFailed):
        return f"{error}; start the service with `keypast serve`, or give its --url"
    if isinstance(error, Refused):
        when = "later" if error.retry_after is None else f"in {error.retry_after:g} s"
        return f"{error}; try again {when}"
    if isinstance(error, Denied) and error.status == 401:
        return f"{error}; set KEYPAST_API_KEY"
    if isinstance(error, ModelNotFound):
        return f"{error}; `keypast models` lists what is loaded"
    return str(error)


def complain(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"keypast: {message}", markup=False, highlight=False)


def failed(message: str, code: int = 1) -> typer.Exit:
    complain(message)
    return typer.Exit(code)


def console() -> Console:
    """Cut to a terminal's width only where there is one."""
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)


def examples(*lines: tuple[str, str], closing: str = "") -> str:
    """The end of a command's help: what to type, and what comes of it."""
    width = max(len(command) for command, _ in lines)
    shown = [f"  {command:<{width}}  {told}".rstrip() for command, told in lines]
    return "\n".join(["", "Examples:", *shown, *(["", closing] if closing else [])])
