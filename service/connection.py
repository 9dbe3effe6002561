"""One connection's bounds, below ASGI: a head that is long or slow, framing that outweighs what it frames, a reader who
takes nothing. What is refused here is answered once, and the connection ends.

           head            body                     reply
    |<- head_seconds ->|<- service.bodies ->|<- stall_seconds without a byte taken ->|
    |<- max_head_bytes ->|
    |<- what is no body: max_head_bytes, and half as much as the body ->|
"""

import asyncio
from http import HTTPStatus
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from keypast.schemas import Code
from service.errors import PROBLEM_TYPE, refusal_problem
from service.settings import Settings
from service.traffic import Traffic

LINGER = 2.0  # seconds that what a refused client still sends is taken and dropped: else it would never see its reply


class Connection(HttpToolsProtocol):
    """`bounded` makes the class that a server takes."""

    settings: Settings
    traffic: Traffic

    @classmethod
    def bounded(cls, settings: Settings, traffic: Traffic) -> type["Connection"]:
        return type("BoundedConnection", (cls,), {"settings": settings, "traffic": traffic})

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._begun = 0  # messages
        self._in_head = False
        self._framing = 0  # bytes of this message that are no body, as far as whole packets tell
        self._framed = 0  # bytes of its body
        self._ended = False
        self._whole = True
        self._clock: asyncio.TimerHandle | None = None  # until the head is there, or the rest of an unread body
        self._stall: asyncio.TimerHandle | None = None  # while the reader takes too little

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, Code.NOT_READY, "too many connections are open")
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._clock, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        begun, framed = self._begun, self._framed
        super().data_received(data)
        if self._begun == begun:  # a packet with the end of one message and the next one's beginning is not told apart
            self._framing += len(data) - (self._framed - framed)
        most = self.settings.max_head_bytes
        if self._in_head and self._framing > most:
            self._too_long()
        elif self._framing > most + self._framed // 2:
            message = "the body comes in too many small pieces; send larger ones"
            self._refuse(HTTPStatus.BAD_REQUEST, Code.BODY_TOO_FINE, message)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun += 1
        self._in_head, self._whole = True, False
        self._framing = self._framed = 0
        if self._clock is None:
            self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # a trailer is nobody's
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_clock()
        head = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._ended:
            return
        if head > self.settings.max_head_bytes:
            self._too_long()
        else:
            super().on_headers_complete()
            self.cycle.transport = cast(asyncio.Transport, _Ending(self))

    def on_body(self, body: bytes) -> None:
        self._framed += len(body)
        if not self._ended:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._whole = True
        self._stop_clock()
        if not self._ended:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._ended:
            return
        super().on_response_complete()
        if not self._whole and not self._in_head and not self.transport.is_closing():
            self._clock = self.loop.call_later(
                self.settings.body_seconds, self.transport.close
            )  # nobody reads the rest

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, Code.MALFORMED, "this is not a request of HTTP/1.1")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _expect_head(self) -> None:
        self._clock = self.loop.call_later(self.settings.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._clock = None
        if self._begun:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, Code.TOO_SLOW, "the headers took too long to come")
        else:
            self.transport.close()  # nothing was said yet, so nothing is answered

    def _watch_reader(self, held: int) -> None:
        self._stall = self.loop.call_later(self.settings.stall_seconds, self._look_at_reader, held)

    def _look_at_reader(self, held: int) -> None:
        now = self.transport.get_write_buffer_size()
        if now < held:
            self._watch_reader(now)
        else:
            self.transport.abort()  # to close would wait for the reader

    def _too_long(self) -> None:
        message = f"the request line and the headers are longer than {self.settings.max_head_bytes} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, Code.HEAD_TOO_LARGE, message)

    def _refuse(self, status: HTTPStatus, code: Code, message: str) -> None:
        """Answers, unless that would be taken for another request's reply, and ends the connection and what it asked
        for."""
        in_head = self._in_head or self.cycle is None or self.cycle.scope is not self.scope
        self._ended = True
        cycle = self.cycle
        if self.transport.is_closing():
            return
        self.traffic.refused(code)
        answered = cycle is None or cycle.response_complete
        if answered if in_head else not (self.pipeline or cycle.response_started):
            body = refusal_problem(status, code, message).model_dump_json(exclude_none=True).encode()
            head = f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: {PROBLEM_TYPE}\r\ncontent-length: {len(body)}"
            retry = "\r\nretry-after: 1" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
            self.transport.write(f"{head}{retry}\r\nconnection: close\r\n\r\n".encode() + body)
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self._linger()

    def end(self) -> None:
        """After the reply that is the connection's last."""
        if self._whole:
            self.transport.close()
        else:
            self._linger()

    def _linger(self) -> None:
        """A connection that is closed with bytes unread is reset, and what was written last may be lost with it."""
        self._ended = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.abort)


class _Ending:
    """A request's transport; its last reply ends the connection, but not before the client could read it."""

    def __init__(self, connection: Connection) -> None:
        self.close = connection.end
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing
