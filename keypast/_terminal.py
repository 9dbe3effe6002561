"""What the commands share: a wrong command line told in one line, a client from the context, one line for an error, a
console that cuts only terminals."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from keypast.client import Client
from keypast.errors import ConnectFailed, Denied, KeypastError, ModelNotFound, Refused

WRONG = 2  # exit code of a wrong command line
# Of a parser's message what is too long, to how it is said here; in this order.
REWORDED = (
    (r"^Invalid value(?: for )?", ""),
    (r"^'([^']*)'(?: / '([^']*)')?(?: \(env var: '[^']*'\))?: ", r"\1: "),
    (r"(: )?(?:Input|Value) should be", " must be"),
    (r", unable to parse string as .*", ""),
    (r"Value error, |^: ", ""),
    (r"^Missing (argument|option) '([^']*?)[.]*'", r"missing \1 \2"),
    (r"^Option '([^']*)' requires", r"\1 needs"),
    (r"\(env var: '([^']*)'\)", r"(or \1 in the environment)"),
    (r"^Got unexpected extra arguments?(?:\(s\))? \((.*)\)", r"not expected: \1"),
    (r"[.]? ?\(Possible options: (.*)\)", r"; did you mean \1?"),
    (r"[.]? Did you mean ", "; did you mean "),
    (r"[.]$", ""),
)
WrongUsage: Any = typer.BadParameter.__base__  # click's, or typer's own copy of it; it has no other public name

VERBATIM = ("", "\b")  # lines before a paragraph of a help text that is not to be wrapped

Connect = Callable[[str | None], Client]  # what a context's `obj` holds in place of Client
Url = Annotated[
    str | None, typer.Option(metavar="URL", help="The service's address; default: KEYPAST_URL, else the local one.")
]


class Commands(TyperGroup):
    """A group of commands. Alone it shows its help; a wrong command line is told in one line, with where to look."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,  # noqa: ANN401  typer's own signature
    ) -> object:
        words = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        except WrongUsage as error:
            complain(self._usage(error.format_message(), words))
            code = WRONG
        except typer.Abort:  # the standard input ended
            code = 1
        if standalone_mode:
            sys.exit(code)
        return code

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def _usage(self, message: str, words: list[str]) -> str:
        path, command = ["keypast"], self
        for word in words:
            found = command.commands.get(word)
            if found is None:
                break
            path.append(word)
            if not isinstance(found, Commands):
                break
            command = found
        told = " ".join(message.split())
        if told.startswith("No such command") and "Did you mean" not in told:
            told += f" Did you mean one of {', '.join(command.commands)}?"
        for pattern, better in REWORDED:
            told = re.sub(pattern, better, told)
        end = "" if told.endswith("?") else "."
        return f"{told[:1].lower()}{told[1:]}{end} Try: {' '.join(path)} --help"


def open_client(context: typer.Context, url: str | None) -> Client:
    connect: Connect = context.obj or Client
    try:
        return connect(url)
    except ValueError as error:
        raise failed(str(error), WRONG) from None


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


def listing(*columns: str) -> Table:
    """A table of one line a thing; `>` before a column's name sets it to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    return table


def size(count: int) -> str:
    """`640 B`, `1.5 MiB`."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    scale = max(0, min(len(units) - 1, (count.bit_length() - 1) // 10))
    return f"{count} B" if scale == 0 else f"{count / 1024**scale:.1f} {units[scale]}"


def examples(*lines: tuple[str, str], closing: str = "") -> str:
    """The end of a command's help: what to type, and what comes of it."""
    width = max((len(command) for command, told in lines if told), default=0)
    shown = [f"  {command:<{width}}  # {told}" if told else f"  {command}" for command, told in lines]
    return "\n".join([*VERBATIM, "Examples:", *shown, *(["", closing] if closing else [])])
