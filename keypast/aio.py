"""The async client: `client` word for word, with `await`.

Use:
    async with AsyncClient() as client, await client.sessions.create("smollm2-135m") as session:
        await session.prefill(text="The capital of France is")
        async with await session.generate(stream=True, max_tokens=16) as tokens:
            async for token in tokens:
                print(token.text, end="", flush=True)
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from os import environ
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import anyio
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


class AsyncClient:
    """One service, over pooled connections; tasks may share a client, but not a session object.

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
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        environment: Mapping[str, str] = environ,
    ) -> None:
        url = _protocol.resolve_url(base_url, environment)
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=timeout,
            headers=_protocol.authorized(headers, api_key, environment),
            transport=transport,
            limits=_protocol.LIMITS,
        )
        self._retries = retries or Retries()
        self._sleep = sleep
        self._binary = binary
        self.sessions = AsyncSessions(self, binary=binary)

    def __repr__(self) -> str:
        return f"<AsyncClient {self._http.base_url}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections; sessions stay in the service."""
        await self._http.aclose()

    async def models(self) -> list[ModelCard]:
        return await self.send(_session.MODELS)

    async def capacity(self) -> Capacity:
        return await self.send(_session.CAPACITY)

    async def batch_step(
        self, steps: "Sequence[tuple[AsyncSession, AppendInputs]]", *, idempotency_key: str | None = None
    ) -> list[AppendResult | StatusError]:
        """One step each of many sessions, in one request and one batch of the model; the inputs are those of `step`,
        the key is the whole request's.

        What became of each: its result, or the error that its own `step` would have raised.
        """
        return await self.send(_session.batch_step(steps, binary=self._binary, key=idempotency_key))

    async def events(self, after: str | None = None) -> "AsyncEventFeed":
        """What happens to the caller's sessions, from now on or after the event of that id, until the service stops.
        An event of type `gap` says that some were missed."""
        return AsyncEventFeed(await self.stream(_session.events(after)), EventReader(after))

    async def ready(self) -> bool:
        """False while the service loads, drains or is down; raises ConnectFailed when there is none."""
        return await self.send(_session.READY)

    async def version(self) -> str:
        """The service's version."""
        return await self.send(_session.VERSION)

    async def send(self, call: Call[T]) -> T:
        """Performs a call, again when that is safe (`Retries`)."""

        async def attempt() -> T:
            return call.parse(await _read(await self._open(call)))

        return await self._tried(call, attempt)

    async def stream(self, call: Call[None]) -> httpx.Response:
        """Performs a call whose reply is a stream; its status is checked, its body unread and the caller's to close."""

        async def attempt() -> httpx.Response:
            response = await self._open(call)
            if not response.is_success:
                call.parse(await _read(response))
            return response

        return await self._tried(call, attempt)

    async def _open(self, call: Call[T]) -> httpx.Response:
        try:
            return await self._http.send(_protocol.build(self._http, call), stream=True)
        except httpx.RequestError as error:
            raise transport_error(error, self._http.base_url) from error

    async def _tried(self, call: Call[Any], attempt: Callable[[], Awaitable[T]]) -> T:
        tried = 0
        while True:
            try:
                return await attempt()
            except KeypastError as error:
                wait = self._retries.wait(tried, error, repeatable=call.repeatable)
                if wait is None:
                    raise
            await self._sleep(wait)
            tried += 1


async def _read(response: httpx.Response) -> Response:
    try:
        async with aclosing(response):
            body = await response.aread()
    except httpx.RequestError as error:
        raise transport_error(error) from error
    return Response(response.status_code, response.headers, body)


class AsyncSessions:
    """The caller's sessions: `client.sessions`."""

    def __init__(self, client: AsyncClient, *, binary: bool) -> None:
        self._client = client
        self._binary = binary

    async def create(self, model: str, **options: Unpack[SessionOptions]) -> "AsyncSession":
        return self._session(await self._client.send(_session.create_session(model, options)))

    async def get(self, session_id: str) -> "AsyncSession":
        return self._session(await self._client.send(_session.get_session(session_id)))

    async def list(self, **filters: Unpack[SessionFilter]) -> AsyncIterator["AsyncSession"]:
        """All of them, a page fetched when it is needed."""
        cursor: str | None = None
        while True:
            page = await self._client.send(_session.list_sessions(filters, cursor))
            for view in page.data:
                yield self._session(view)
            cursor = page.next_cursor
            if cursor is None:
                return

    async def delete(self, session_id: str) -> Receipt:
        return await self._client.send(_session.delete_session(session_id))

    def _session(self, view: SessionView) -> "AsyncSession":
        return AsyncSession(self._client, view, binary=self._binary)


class AsyncSession(SessionCore):
    """A session of the service. As a context manager it deletes itself at the end."""

    def __init__(self, client: AsyncClient, view: SessionView, *, binary: bool) -> None:
        super().__init__(view, binary=binary)
        self._client = client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with suppress(KeypastError):  # gone already, or unreachable: neither may hide what the block raised
            await self.delete()

    async def prefill(self, **inputs: Unpack[AppendInputs]) -> AppendResult:
        """Appends n >= 1 positions to any past. Raises LengthExceeded, PreconditionFailed, Refused, and the rest."""
        return await self._client.send(self._append("prefill", inputs))

    async def step(self, **inputs: Unpack[AppendInputs]) -> AppendResult:
        """Appends one position a row to a past that is not empty (else WrongState)."""
        return await self._client.send(self._append("step", inputs))

    async def score(self, **inputs: Unpack[AppendInputs]) -> AppendResult:
        """What `prefill` would answer, without keeping it. The result has the lengths that it would have made; the
        session and its version stay as they are."""
        return await self._client.send(self._score(inputs))

    @overload
    async def generate(self, *, stream: Literal[True], **options: Unpack[GenerateOptions]) -> "AsyncTokenStream": ...
    @overload
    async def generate(
        self, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> GenerateReply: ...
    async def generate(
        self, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> "GenerateReply | AsyncTokenStream":
        """The service's own loop of sample and step; every token is a commit."""
        if not stream:
            return await self._client.send(self._generate(options))
        response = await self._client.stream(self._stream(options))
        return AsyncTokenStream(response, StreamReader(self._moved))

    @overload
    async def fork(
        self, count: None = None, *, at: int | list[int] | None = None, **change: Unpack[Change]
    ) -> "AsyncSession": ...
    @overload
    async def fork(
        self, count: int, *, at: int | list[int] | None = None, **change: Unpack[Change]
    ) -> "list[AsyncSession]": ...
    async def fork(
        self, count: int | None = None, *, at: int | list[int] | None = None, **change: Unpack[Change]
    ) -> "AsyncSession | list[AsyncSession]":
        """Children that share this session's blocks until one writes. Without a count one child, else a list.

        `at`: their length, one int or one a row; default: this session's.
        """
        views = await self._client.send(self._fork(1 if count is None else count, at, change))
        children = [AsyncSession(self._client, view, binary=self._binary) for view in views]
        return children if count is not None else children[0]

    async def truncate(self, length: int | list[int], **change: Unpack[Change]) -> None:
        """Rolls back to an earlier length, one int or one a row."""
        await self._client.send(self._truncate(length, change))

    async def update(self, **changes: Unpack[SessionChanges]) -> None:
        """Time to live, pin and labels; the version stays. Raises PreconditionFailed, QuotaExceeded, and the rest."""
        await self._client.send(self._update(changes))

    async def past(self, **expectation: Unpack[Expectation]) -> Past:
        """The session's keys and values as arrays; the session stays as it is."""
        return await self._client.send(self._past(expectation))

    async def load_past(self, past: Past, **change: Unpack[Change]) -> None:
        """A past into this session, which must be empty (else WrongState) and of the same model. One new version."""
        await self._client.send(self._load_past(past, change))

    async def refresh(self) -> Self:
        """Asks the service how the session is: `view`, `version` and `valid_length`."""
        await self._client.send(self._refresh())
        return self

    async def delete(self, **change: Unpack[Change]) -> Receipt:
        """Frees every block now."""
        return await self._client.send(self._delete(change))


class AsyncTokenStream(AsyncIterator[Token]):
    """The tokens of one `generate(stream=True)`; `end` is the stream's last event, once it has come.

    Leaving early, by `aclose` or `async with`, stops the service within a token. An `async for` alone does not close.
    """

    def __init__(self, response: httpx.Response, reader: StreamReader) -> None:
        self._response = response
        self._reader = reader
        self._tokens = _tokens(response, reader)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def __anext__(self) -> Token:
        return await anext(self._tokens)

    @property
    def end(self) -> StreamEnd | None:
        return self._reader.end

    @property
    def replayed(self) -> bool:
        """Whether this was done before, by the same key or version, and is told again."""
        return _protocol.was_replayed(self._response.headers)

    async def aclose(self) -> None:
        await self._tokens.aclose()
        await self._response.aclose()


async def _tokens(response: httpx.Response, reader: StreamReader) -> AsyncGenerator[Token, None]:
    async with aclosing(response):
        try:
            async for chunk in response.aiter_bytes():
                for token in reader.feed(chunk):
                    yield token
        except httpx.RequestError as error:
            if not reader.done:
                raise StreamBroken(f"the stream broke off: {str(error) or type(error).__name__}") from error
        reader.finish()


class AsyncEventFeed(AsyncIterator[Event]):
    """The events of one `client.events()`. `last_id` is what resumes it: `client.events(feed.last_id)`.

    It ends when the service stops; a connection that breaks raises StreamBroken. Leave it by `aclose` or `async with`.
    """

    def __init__(self, response: httpx.Response, reader: EventReader) -> None:
        self._response = response
        self._reader = reader
        self._events = _events(response, reader)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def __anext__(self) -> Event:
        return await anext(self._events)

    @property
    def last_id(self) -> str | None:
        return self._reader.last_id

    async def aclose(self) -> None:
        await self._events.aclose()
        await self._response.aclose()


async def _events(response: httpx.Response, reader: EventReader) -> AsyncGenerator[Event, None]:
    async with aclosing(response):
        try:
            async for chunk in response.aiter_bytes():
                for event in reader.feed(chunk):
                    yield event
        except httpx.RequestError as error:
            raise StreamBroken(f"the events broke off: {str(error) or type(error).__name__}") from error
