"""Replies that are not sent at once.

Server-sent events are `data:` lines of JSON, comments while there is silence, `[DONE]` at the end.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from fastapi import Response
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from service.errors import note, problem_of
from service.worker import ReaderGone

EVENT_STREAM = "text/event-stream"
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
PIECE = 1 << 20  # bytes of a long body that are handed over at a time


def event(json: str) -> bytes:
    return f"data: {json}\n\n".encode()


def named_event(event_id: str, name: str, json: str) -> bytes:
    return f"id: {event_id}\nevent: {name}\ndata: {json}\n\n".encode()


class EventStream(Response):
    """Sends what `events` gives; an error on the way is told as the last event, a problem whose `status` is the one
    that it would have had, since the reply's own is out already.

    `events` is closed when the reader leaves, and always. `first` has been taken from it already; `end` is sent after
    the last.
    """

    media_type = EVENT_STREAM

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        end: bytes = DONE,
        headers: Mapping[str, str] | None = None,
        first: bytes = b"",
    ) -> None:
        unheld = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nobody may hold it back
        super().__init__(headers={**unheld, **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._end = end
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                if self._first:
                    await send({"type": "http.response.body", "body": self._first, "more_body": True})
                async for chunk in events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except (ReaderGone, OSError):  # the server may say so by either
                raise ReaderGone from None
            except Exception as error:
                problem = problem_of(error, scope["path"], scope["state"]["request_id"])
                note(HTTPConnection(scope), problem)
                body = event(problem.model_dump_json(exclude_none=True))
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": self._end, "more_body": False})


class LongBody(Response):
    """Sends its parts piece by piece: no copy of the whole is made, and others are answered in between."""

    def __init__(self, parts: Sequence[bytes | memoryview], headers: Mapping[str, str], media_type: str) -> None:
        super().__init__(None, 200, {**headers, "Content-Length": str(sum(map(len, parts)))}, media_type)
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            for part in self._parts:
                for at in range(0, len(part), PIECE):
                    await send({"type": "http.response.body", "body": part[at : at + PIECE], "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            raise ReaderGone from None
