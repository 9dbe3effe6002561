"""Server-sent events: bytes in, tokens or events out. No I/O: the sync and the async shell feed the same reader."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from keypast import wire
from keypast.errors import KeypastError, ProtocolError, StreamBroken, from_problem
from keypast.schemas import Code, ErrorBody, Event, Problem, StreamEnd, StreamToken

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """The `data` of each event, whatever chunks the bytes come in; comments and other fields are skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._after_cr = False  # a line feed that comes first belongs to the carriage return before it

    def feed(self, chunk: bytes) -> Iterator[str]:
        if self._after_cr and chunk:
            chunk, self._after_cr = chunk.removeprefix(b"\n"), False
        self._after_cr = self._after_cr or chunk.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        for line in lines:
            if line:
                self._field(line)
            elif self._data:
                data, self._data = "\n".join(self._data), []
                yield data

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class Token:
    """One commit of a stream: one entry a row in each list; a row that has ended has None and ""."""

    token_ids: list[int | None]
    texts: list[str]
    valid_length: list[int]
    version: int
    logprobs: list[float | None] | None = None

    @property
    def text(self) -> str:
        """The first row's text: all there is in a session of one row."""
        return self.texts[0]

    @property
    def token_id(self) -> int | None:
        return self.token_ids[0]


class StreamReader:
    """Tells `moved` of every commit it reads. After `[DONE]`, `end` is the stream's last event."""

    def __init__(self, moved: Callable[[int, list[int]], None]) -> None:
        self.end: StreamEnd | None = None
        self.done = False
        self._moved = moved
        self._events = EventParser()

    def feed(self, chunk: bytes) -> Iterator[Token]:
        """Raises what an error event says, after the tokens before it; ProtocolError for an event of no known form.

        What follows `[DONE]` is read and dropped, so that the connection can be used again.
        """
        for data in self._events.feed(chunk):
            self.done = self.done or data == "[DONE]"
            token = None if self.done else self._event(data)
            if token is not None:
                yield token

    def finish(self) -> None:
        """Called when the bytes end. Raises StreamBroken if that is too early."""
        if not self.done or self.end is None:
            raise StreamBroken("the stream broke off; the session keeps every token that was committed")

    def _event(self, data: str) -> Token | None:
        try:
            event = json.loads(data)
            if "error" in event:
                raise _event_error(data, event)
            if "finish_reason" not in event:
                return self._token(wire.validated(StreamToken, data.encode()))
            self.end = wire.validated(StreamEnd, data.encode())
        except (ValueError, TypeError):
            raise ProtocolError(f"not an event of a stream: {data[:200]}") from None
        self._moved(self.end.version, self.end.valid_length)
        return _held_back(self.end)

    def _token(self, event: StreamToken) -> Token:
        self._moved(event.version, event.valid_length)
        return Token(event.token_ids, event.text, event.valid_length, event.version, event.logprobs)


class EventReader:
    """Of `GET /v1/events`; `last_id` is that of the last event read. The stream may end at any time."""

    def __init__(self, last_id: str | None) -> None:
        self.last_id = last_id
        self._events = EventParser()

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Raises what an error event says; ProtocolError for an event of no known form."""
        for data in self._events.feed(chunk):
            event = _sent(data)
            self.last_id = event.id
            yield event


def _sent(data: str) -> Event:
    try:
        if "error" in (event := json.loads(data)):
            raise _event_error(data, event)
        return wire.validated(Event, data.encode())
    except (ValueError, TypeError):
        raise ProtocolError(f"not an event: {data[:200]}") from None


def _held_back(end: StreamEnd) -> Token | None:
    if end.text is None or not any(end.text):
        return None
    return Token([None] * len(end.text), end.text, end.valid_length, end.version)


def _event_error(data: str, event: dict[str, object]) -> KeypastError:
    """A whole problem, or OpenAI's `error` member alone; that has no status, since the reply's own was 200."""
    if "code" in event and "status" in event:
        return from_problem(wire.validated(Problem, data.encode()))
    error = wire.validated(ErrorBody, json.dumps(event["error"]).encode())
    code = error.code or Code.INTERNAL
    return from_problem(Problem(title="Stream failed", status=500, detail=error.message, code=code, error=error))
