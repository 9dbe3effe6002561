"""The sync client: a thin shell of httpx around `_protocol` and `_session`. `aio` is its async twin.

Use:
    with Client() as client, client.sessions.create("smollm2-135m") as session:
        session.prefill(text="The capital of France is")
        for token in session.generate(stream=True, max_tokens=16):
            print(token.text, end="", flush=True)
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from os import environ
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import httpx

from keypast import _protocol, _session
from keypast._protocol import AppendResult, Call, Response, Retries, transport_error
from keypast._session import (
    AppendInputs,
    Change,
    Expectation,
    GenerateOptions,
    SessionChanges,
    SessionCore,
    SessionFilter,
    SessionOptions,
)
from keypast._stream import EventReader, StreamReader, Token
from keypast.errors import KeypastError, StatusError, StreamBroken
from keypast.past import Past
from keypast.schemas import Capacity, Event, GenerateReply, ModelCard, Receipt, SessionView, StreamEnd

T = TypeVar("T")


class Client:
    """One service, over pooled connections; threads may share a client, but not a session object.

    `base_url`: else the environment's KEYPAST_URL, else http://127.0.0.1:8000. `binary`: tensors travel as safetensors,
    else as base64 in JSON. `transport`, `sleep` and `environment` are for tests. Every method may raise the tree in
    `keypast.errors`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        timeout: float | httpx.Timeout = _protocol.DEFAULT_TIMEOUT,
        headers: Mapping[str, str] | None = None,
        api_key: str | None = None,
        retries: Retries | None = None,
        binary: bool = True,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        environment: Mapping[str, str] = environ,
    ) -> None:
        url = _protocol.resolve_url(base_url, environment)
        self._http = httpx.Client(
            base_url=url,
            timeout=timeout,
            headers=_protocol.authorized(headers, api_key, environment),
            transport=transport,
            limits=_protocol.LIMITS,
        )
        self._retries = retries or Retries()
        self._sleep = sleep
        self._binary = binary
        self.sessions = Sessions(self, binary=binary)

    def __repr__(self) -> str:
        return f"<Client {self._http.base_url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; sessions stay in the service."""
        self._http.close()

    def models(self) -> list[ModelCard]:
        return self.send(_session.MODELS)

    def capacity(self) -> Capacity:
        return self.send(_session.CAPACITY)

    def batch_step(
        self, steps: "Sequence[tuple[Session, AppendInputs]]", *, idempotency_key: str | None = None
    ) -> list[AppendResult | StatusError]:
        """One step each of many sessions, in one request and one batch of the model; the inputs are those of `step`,
        the key is the whole request's.

        What became of each: its result, or the error that its own `step` would have raised.
        """
        return self.send(_session.batch_step(steps, binary=self._binary, key=idempotency_key))

    def events(self, after: str | None = None) -> "EventFeed":
        """What happens to the caller's sessions, from now on or after the event of that id, until the service stops.
        An event of type `gap` says that some were missed."""
        return EventFeed(self.stream(_session.events(after)), EventReader(after))

    def ready(self) -> bool:
        """False while the service loads, drains or is down; raises ConnectFailed when there is none."""
        return self.send(_session.READY)

    def version(self) -> str:
        """The service's version."""
        return self.send(_session.VERSION)

    def send(self, call: Call[T]) -> T:
        """Performs a call, again when that is safe (`Retries`)."""
        return self._tried(call, lambda: call.parse(_read(self._open(call))))

    def stream(self, call: Call[None]) -> httpx.Response:
        """Performs a call whose reply is a stream; its status is checked, its body unread and the caller's to close."""

        def attempt() -> httpx.Response:
            response = self._open(call)
            if not response.is_success:
                call.parse(_read(response))
            return response

        return self._tried(call, attempt)

    def _open(self, call: Call[T]) -> httpx.Response:
        try:
            return self._http.send(_protocol.build(self._http, call), stream=True)
        except httpx.RequestError as error:
            raise transport_error(error, self._http.base_url) from error

    def _tried(self, call: Call[Any], attempt: Callable[[], T]) -> T:
        tried = 0
        while True:
            try:
                return attempt()
            except KeypastError as error:
                wait = self._retries.wait(tried, error, repeatable=call.repeatable)
                if wait is None:
                    raise
            self._sleep(wait)
            tried += 1


def _read(response: httpx.Response) -> Response:
    try:
        with closing(response):
            body = response.read()
    except httpx.RequestError as error:
        raise transport_error(error) from error
    return Response(response.status_code, response.headers, body)


class Sessions:
    """The caller's sessions: `client.sessions`."""

    def __init__(self, client: Client, *, binary: bool) -> None:
        self._client = client
        self._binary = binary

    def create(self, model: str, **options: Unpack[SessionOptions]) -> "Session":
        return self._session(self._client.send(_session.create_session(model, options)))

    def get(self, session_id: str) -> "Session":
        return self._session(self._client.send(_session.get_session(session_id)))

    def list(self, **filters: Unpack[SessionFilter]) -> Iterator["Session"]:
        """All of them, a page fetched when it is needed."""
        cursor: str | None = None
        while True:
            page = self._client.send(_session.list_sessions(filters, cursor))
            yield from map(self._session, page.data)
            cursor = page.next_cursor
            if cursor is None:
                return

    def delete(self, session_id: str) -> Receipt:
        return self._client.send(_session.delete_session(session_id))

    def _session(self, view: SessionView) -> "Session":
        return Session(self._client, view, binary=self._binary)


class Session(SessionCore):
    """A session of the service. As a context manager it deletes itself at the end."""

    def __init__(self, client: Client, view: SessionView, *, binary: bool) -> None:
        super().__init__(view, binary=binary)
        self._client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(KeypastError):  # gone already, or unreachable: neither may hide what the block raised
            self.delete()

    def prefill(self, **inputs: Unpack[AppendInputs]) -> AppendResult:
        """Appends n >= 1 positions to any past. Raises LengthExceeded, PreconditionFailed, Refused, and the rest."""
        return self._client.send(self._append("prefill", inputs))

    def step(self, **inputs: Unpack[AppendInputs]) -> AppendResult:
        """Appends one position a row to a past that is not empty (else WrongState)."""
        return self._client.send(self._append("step", inputs))

    def score(self, **inputs: Unpack[AppendInputs]) -> AppendResult:
        """What `prefill` would answer, without keeping it. The result has the lengths that it would have made; the
        session and its version stay as they are."""
        return self._client.send(self._score(inputs))

    @overload
    def generate(self, *, stream: Literal[True], **options: Unpack[GenerateOptions]) -> "TokenStream": ...
    @overload
    def generate(self, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]) -> GenerateReply: ...
    def generate(self, *, stream: bool = False, **options: Unpack[GenerateOptions]) -> "GenerateReply | TokenStream":
        """The service's own loop of sample and step; every token is a commit."""
        if not stream:
            return self._client.send(self._generate(options))
        response = self._client.stream(self._stream(options))
        return TokenStream(response, StreamReader(self._moved))

    @overload
    def fork(self, count: None = None, *, at: int | list[int] | None = None, **change: Unpack[Change]) -> "Session": ...
    @overload
    def fork(self, count: int, *, at: int | list[int] | None = None, **change: Unpack[Change]) -> "list[Session]": ...
    def fork(
        self, count: int | None = None, *, at: int | list[int] | None = None, **change: Unpack[Change]
    ) -> "Session | list[Session]":
        """Children that share this session's blocks until one writes. Without a count one child, else a list.

        `at`: their length, one int or one a row; default: this session's.
        """
        views = self._client.send(self._fork(1 if count is None else count, at, change))
        children = [Session(self._client, view, binary=self._binary) for view in views]
        return children if count is not None else children[0]

    def truncate(self, length: int | list[int], **change: Unpack[Change]) -> None:
        """Rolls back to an earlier length, one int or one a row."""
        self._client.send(self._truncate(length, change))

    def update(self, **changes: Unpack[SessionChanges]) -> None:
        """Time to live, pin and labels; the version stays. Raises PreconditionFailed, QuotaExceeded, and the rest."""
        self._client.send(self._update(changes))

    def past(self, **expectation: Unpack[Expectation]) -> Past:
        """The session's keys and values as arrays; the session stays as it is."""
        return self._client.send(self._past(expectation))

    def load_past(self, past: Past, **change: Unpack[Change]) -> None:
        """A past into this session, which must be empty (else WrongState) and of the same model. One new version."""
        self._client.send(self._load_past(past, change))

    def refresh(self) -> Self:
        """Asks the service how the session is: `view`, `version` and `valid_length`."""
        self._client.send(self._refresh())
        return self

    def delete(self, **change: Unpack[Change]) -> Receipt:
        """Frees every block now."""
        return self._client.send(self._delete(change))


class TokenStream(Iterator[Token]):
    """The tokens of one `generate(stream=True)`; `end` is the stream's last event, once it has come.

    Leaving early, by `close` or `with` or out of a `for` over the call itself, stops the service within a token.
    """

    def __init__(self, response: httpx.Response, reader: StreamReader) -> None:
        self._response = response
        self._reader = reader
        self._tokens = _tokens(response, reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __next__(self) -> Token:
        return next(self._tokens)

    @property
    def end(self) -> StreamEnd | None:
        return self._reader.end

    @property
    def replayed(self) -> bool:
        """Whether this was done before, by the same key or version, and is told again."""
        return _protocol.was_replayed(self._response.headers)

    def close(self) -> None:
        self._tokens.close()
        self._response.close()


def _tokens(response: httpx.Response, reader: StreamReader) -> Generator[Token, None, None]:
    """A function and not a method: a cycle of references would keep a stream open that a `for` was left from."""
    with closing(response):
        try:
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)
        except httpx.RequestError as error:
            if not reader.done:
                raise StreamBroken(f"the stream broke off: {str(error) or type(error).__name__}") from error
        reader.finish()


class EventFeed(Iterator[Event]):
    """The events of one `client.events()`. `last_id` is what resumes it: `client.events(feed.last_id)`.

    It ends when the service stops; a connection that breaks raises StreamBroken. Leave it by `close` or `with`.
    """

    def __init__(self, response: httpx.Response, reader: EventReader) -> None:
        self._response = response
        self._reader = reader
        self._events = _events(response, reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __next__(self) -> Event:
        return next(self._events)

    @property
    def last_id(self) -> str | None:
        return self._reader.last_id

    def close(self) -> None:
        self._events.close()
        self._response.close()


def _events(response: httpx.Response, reader: EventReader) -> Generator[Event, None, None]:
    with closing(response):
        try:
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)
        except httpx.RequestError as error:
            raise StreamBroken(f"the events broke off: {str(error) or type(error).__name__}") from error
