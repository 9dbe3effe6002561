"""A conversation in the terminal over one session. A turn is a prefill of the new message and a streamed generate.

    /fork           go on with a copy; the original waits     /undo    back to before the last turn
    /switch [ID]    the next copy, or the one whose id begins so    /stats   what the session holds, and how fast it was
    /help           these lines                               /quit    end, and delete the sessions

Ctrl-C stops a reply at the last committed token; Ctrl-D quits.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Console

from keypast import _terminal
from keypast.client import Client, Session
from keypast.errors import (
    KeypastError,
    LengthExceeded,
    SessionGone,
    SessionNotFound,
)

HELP = {
    "/fork": "go on with a copy; the original waits",
    "/switch [ID]": "the next copy, or the one whose id begins so",
    "/undo": "back to before the last turn",
    "/stats": "what the session holds, and how fast the last reply was",
    "/help": "these lines",
    "/quit": "end, and delete the sessions (Ctrl-D)",
}
FINISHED = {
    "length": "[cut: --max-tokens, or the session's max_length, is reached]",
    "cancelled": "[cut by the service]",
}


def advice(error: KeypastError) -> str:
    """One line: what went wrong and what to do about it, in a chat."""
    if isinstance(error, LengthExceeded):
        return f"{error}; /undo, or begin a new chat"
    if isinstance(error, SessionGone | SessionNotFound):
        return f"{error}; begin a new chat"
    return _terminal.advice(error)


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one reply. `first` is the seconds from the message to the first token."""

    tokens: int
    first: float
    rest: float

    def __str__(self) -> str:
        rate = f"{(self.tokens - 1) / self.rest:.1f} tokens/s" if self.tokens > 1 and self.rest > 0 else "one token"
        return f"{rate}, first after {self.first * 1000:.0f} ms"


@dataclass(slots=True, eq=False)
class Branch:
    """A session and the lengths at which its turns began."""

    session: Session
    turns: list[int] = field(default_factory=list)
    speed: Speed | None = None


@dataclass(frozen=True, slots=True)
class ChatOptions:
    system: str | None = None
    temperature: float = 0.0
    max_tokens: int = 512


class Chat:
    """`read` gives the next line, or raises EOFError; `console` is where the reply goes."""

    def __init__(
        self, client: Client, model: str, options: ChatOptions, *, console: Console, read: Callable[[], str]
    ) -> None:
        self._options = options
        self._console = console
        self._read = read
        self._branches = [Branch(client.sessions.create(model))]
        self._model = model
        self._at = 0

    @property
    def branch(self) -> Branch:
        return self._branches[self._at]

    def run(self) -> None:
        """Until /quit or the end of the input; deletes the sessions. Raises KeypastError when the session is lost."""
        commands = {
            "/fork": self._fork,
            "/switch": self._switch,
            "/undo": self._undo,
            "/stats": self._stats,
            "/help": self._help,
        }
        try:
            if self._console.is_terminal:
                self._say(f"{self._model}; /help lists the commands, Ctrl-C stops a reply, Ctrl-D ends")
            while (line := self._line()) != "/quit":
                name, _, argument = line.partition(" ")
                if not line:
                    continue
                if not name.startswith("/"):
                    self._guard(self._turn, line)
                elif name in commands:
                    self._guard(commands[name], argument.strip())
                else:
                    self._say(f"no such command: {name}; /help lists them")
        finally:
            for branch in self._branches:
                with suppress(KeypastError):  # gone already, or unreachable
                    branch.session.delete()

    def _line(self) -> str:
        while True:
            try:
                return self._read().strip()
            except EOFError:
                return "/quit"
            except KeyboardInterrupt:
                self._say("Ctrl-D or /quit ends the chat")

    def _guard(self, act: Callable[[str], None], argument: str) -> None:
        """A refusal costs one line, not the chat; a lost session ends it."""
        try:
            act(argument)
        except (SessionGone, SessionNotFound):
            raise
        except KeypastError as error:
            self._say(advice(error))

    def _say(self, line: str) -> None:
        self._console.print(line, style="dim", markup=False, highlight=False, soft_wrap=not self._console.is_terminal)

    # ---- a turn ----

    def _turn(self, text: str) -> None:
        branch = self.branch
        session = branch.session
        start = session.valid_length[0]
        messages = [{"role": "user", "content": text}]
        if start == 0 and self._options.system is not None:
            messages.insert(0, {"role": "system", "content": self._options.system})
        began = time.perf_counter()
        try:
            result = session.prefill(messages=messages)
        except KeyboardInterrupt:
            session.truncate(start)  # runs after the prefill, should that still commit
            self._say("[stopped before the reply; the message is taken back]")
            return
        # not `start`: a reply that was cut short may have committed one more token than this side has seen
        branch.turns.append(result.past_length[0])
        self._reply(branch, began)

    def _reply(self, branch: Branch, began: float) -> None:
        times: list[float] = []
        options = self._options
        try:
            with branch.session.generate(
                stream=True, max_tokens=options.max_tokens, sample={"temperature": options.temperature}
            ) as tokens:
                for token in tokens:
                    self._console.out(token.text, end="", highlight=False)
                    times.append(time.perf_counter())
            self._console.out("")
            if tokens.end is not None and (why := FINISHED.get(tokens.end.finish_reason[0])):
                self._say(why)
        except KeyboardInterrupt:
            self._console.out("")
            branch.session.refresh()
            self._say(f"[stopped at {branch.session.valid_length[0]} positions]")
        except KeypastError:
            self._console.out("")
            raise
        finally:
            if times:
                branch.speed = Speed(len(times), times[0] - began, times[-1] - times[0])

    # ---- commands; each takes what follows its name ----

    def _fork(self, _: str) -> None:
        parent = self.branch
        child = Branch(parent.session.fork(), list(parent.turns))
        self._branches.append(child)
        self._at = len(self._branches) - 1
        self._say(f"on {child.session.id}, a copy of {parent.session.id}; /switch goes back")

    def _switch(self, prefix: str) -> None:
        order = [(self._at + step) % len(self._branches) for step in range(1, len(self._branches) + 1)]
        found = [at for at in order if self._branches[at].session.id.startswith(prefix)]
        if not found:
            ids = ", ".join(branch.session.id for branch in self._branches)
            self._say(f"no session begins with {prefix}; there are {ids}")
            return
        self._at = found[0]
        self._say(f"on {self.branch.session.id}, {self.branch.session.valid_length[0]} positions")

    def _undo(self, _: str) -> None:
        branch = self.branch
        if not branch.turns:
            self._say("no turn to take back")
            return
        branch.session.truncate(branch.turns[-1])
        branch.turns.pop()
        self._say(f"back at {branch.session.valid_length[0]} positions")

    def _stats(self, _: str) -> None:
        view = self.branch.session.refresh().view
        self._say(
            f"{view.id}: {view.valid_length[0]} of {view.max_length} positions, {_terminal.size(view.bytes)}"
            f" in {view.blocks} blocks ({view.shared_blocks} shared)"
        )
        if self.branch.speed is not None:
            self._say(f"last reply: {self.branch.speed}")

    def _help(self, _: str) -> None:
        for name, what in HELP.items():
            self._say(f"{name:14}{what}")
