"""What an operator sees of loading: plain lines in a file, one live line on a terminal."""

import io
import re

from rich.console import Console

from service.progress import Display

TOLD = ["starting torch", "m.gguf 1/3 tensors", "m.gguf 2/3 tensors", "m.gguf 2/3 tensors", "/models/1/2: read", "last"]


def shown(*, terminal: bool) -> str:
    written = io.StringIO()
    console = Console(
        file=written, force_terminal=terminal, width=60, highlight=False, soft_wrap=True, legacy_windows=False
    )
    with Display(console) as display:
        for message in TOLD:
            display(message)
            display.refresh()
    return written.getvalue()


def test_elsewhere_than_on_a_terminal_each_thing_is_a_plain_line() -> None:
    assert shown(terminal=False) == "starting torch\nm.gguf\n/models/1/2: read\nlast\n"


def test_on_a_terminal_one_line_tells_what_goes_on_and_is_gone_at_the_end() -> None:
    written = shown(terminal=True)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", written).split("\n")
    for message in TOLD:
        assert any(line.rstrip().endswith(message) for line in "".join(lines).split("\r")), message
    assert written.endswith("\x1b[1A\x1b[2K")  # the line is erased
