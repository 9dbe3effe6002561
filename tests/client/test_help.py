"""The help of every command has examples, and each of them is a command line that parses."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from keypast.cli import app

ROOT = typer.main.get_command(app)


def commands(
    group: object = ROOT, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], typer.core.TyperCommand]]:
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


LEAVES = dict(commands())


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_example_parses(path: tuple[str, ...]) -> None:
    command = LEAVES[path]
    lines = re.findall(
        rf"keypast {' '.join(path)}(?=\s|$)(.*?)(?:\s{{2,}}|\||$)", command.epilog or "", flags=re.MULTILINE
    )
    assert lines
    for line in lines:
        with command.make_context(path[-1], shlex.split(line)) as context:
            assert context.args == []


def typed() -> list[str]:
    """The command lines of README and guides, without what the shell does."""
    top = Path(__file__).parents[2]
    pages = [top / "README.md", *(top / "docs").glob("*.md")]
    blocks = [block for page in pages for block in re.findall(r"```(?:sh)?\n(.*?)```", page.read_text(), re.DOTALL)]
    found = re.findall(r"^(?:[$] |KEYPAST_\w+=\S+ )?keypast (\S[^#|>\n]*)", "\n".join(blocks), re.MULTILINE)
    return sorted({line.strip() for line in found})


@pytest.mark.parametrize("line", typed())
def test_every_command_line_of_the_guides_parses(line: str) -> None:
    words = shlex.split(line)
    path = tuple(words[:2]) if tuple(words[:2]) in LEAVES else tuple(words[:1])
    with LEAVES[path].make_context(path[-1], words[len(path) :]) as context:
        assert context.args == []


def test_an_example_stands_on_a_line_of_its_own() -> None:
    shown = CliRunner().invoke(app, ["sessions", "fork", "--help"], env={"COLUMNS": "120"}).stdout
    assert re.search(
        r"Examples:\n    keypast sessions fork tour --count 3\n    keypast sessions fork tour --at 12  # ", shown
    )


@pytest.mark.parametrize("path", [(), ("sessions",), ("keys",), *LEAVES], ids=" ".join)
def test_a_help_fits_a_terminal_and_names_what_options_take(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"\[\[|<\w+( range)?>|[a-z]\.\.\.$|[\x00-\x09\x0b-\x1f]", shown, re.MULTILINE), shown


@pytest.mark.parametrize(("typed", "offered"), [("keypast ses", "sessions"), ("keypast sessions ex", "export")])
def test_the_shell_completes(typed: str, offered: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    environment = {**os.environ, "_KEYPAST_COMPLETE": "complete_bash", **words}
    code = "import sys; sys.argv[0] = 'keypast'; from keypast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [offered], done.stderr
