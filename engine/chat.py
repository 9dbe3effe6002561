"""Chat templates: messages to one text, by the Jinja template that came with the model.

A template is a program from the operator's model files, never from a request. It runs in Jinja's immutable sandbox
with what transformers gives it (`raise_exception`, `strftime_now`, `tojson`, loop controls, `{% generation %}`), under
limits on the size of what goes in and out and on its time, which is looked at on every line the template executes.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import FrameType, TracebackType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidInput

ROLES = ("system", "user", "assistant")
MAX_TEMPLATE = 2**18  # characters
MAX_CHARACTERS = 2**22  # of all messages together, and again as much of what a template may add to them
MAX_SECONDS = 2.0
_TEMPLATE_FILE = "<template>"  # the file name Jinja compiles a template text under


class ChatTemplate:
    """`special_tokens` are the names a template may use: bos_token, eos_token, ..."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
        seconds: float = MAX_SECONDS,
    ) -> None:
        if len(source) > MAX_TEMPLATE:
            raise InvalidInput("model", f"the chat template is longer than {MAX_TEMPLATE} characters")
        self.source = source
        self.special_tokens = special_tokens
        self.seconds = seconds
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InvalidInput("model", f"the chat template cannot be parsed: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text with the generation prompt. Raises InvalidInput("messages", ...) when the template refuses."""
        pieces: list[str] = []
        room = 2 * MAX_CHARACTERS
        names = {**self.special_tokens, "messages": list(messages), "tools": None, "documents": None}
        try:
            with _Deadline(self.seconds):
                for piece in self._template.generate(**names, add_generation_prompt=True):
                    pieces.append(piece)
                    room -= len(piece)
                    if room < 0:
                        raise jinja2.TemplateRuntimeError("its text grows too long")
        except Exception as error:  # a template is a program: it may raise anything
            raise InvalidInput("messages", f"the model's chat template refused them: {error}") from error
        return "".join(pieces)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Roles and contents as texts; raises InvalidInput naming the field. Other keys of a message are not used.

    A content given as parts is their texts, joined as they are.
    """
    if not messages:
        raise InvalidInput("messages", "must hold at least one message")
    read = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise InvalidInput(f"messages[{i}].role", f"is {role!r}; it must be one of {', '.join(ROLES)}")
        read.append({"role": role, "content": _content(f"messages[{i}].content", message.get("content"))})
    if sum(len(message["content"]) for message in read) > MAX_CHARACTERS:
        raise InvalidInput("messages", f"are longer than {MAX_CHARACTERS} characters together")
    return read


def _content(field: str, content: object) -> str:
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise InvalidInput(field, 'must be a text or a list of {"type": "text", "text": ...} parts')
    return valid_text(field, content)


def valid_text(field: str, text: str) -> str:
    """`text`, if it can be UTF-8: JSON lets half a surrogate pair through."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(field, f"has half a surrogate pair at character {error.start}") from error
    return text


class _Deadline:
    """Raises in the template's own code once `seconds` are over.

    A trace function sees every line of the template that runs and nothing else, so a loop that prints nothing is
    stopped too, in any thread and without another one. One filter on bounded data is the longest unlooked-at step.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        sys.settrace(self.before)

    def _call(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename == _TEMPLATE_FILE else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        if time.monotonic() > self.end:
            raise jinja2.TemplateRuntimeError("it takes too long")
        return self._line


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  as Extension declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own it escapes nothing for HTML, as in transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
