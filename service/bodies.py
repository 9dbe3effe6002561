"""What comes in as a request's body: in time, in pieces that are worth it, unpacked, and of all requests together no
more than there is room for. One layer before every route, so that a route that is yet to be written has it too. How
long a body may be, each route says of what it unpacks to. What goes out packed is packed here as well.
"""

import asyncio
import re
import zlib
from collections import Counter
from collections.abc import Mapping

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keypast.wire import MalformedError, UnsupportedMediaError
from service.errors import BodiesFull, BodyTooFine, BodyTooSlow, problem_response

SLOWEST = 16 << 10  # bytes a second that give a long body more time than the first seconds
FEW = 1024  # pieces that may be of any size
FINE = 64  # bytes: what comes in more than a few pieces has more in each, on the average
AT_ONCE = 256 << 10  # bytes that are unpacked at a time
UNCOUNTED = 64 << 10  # bytes of each body that are always let in: steps never wait for room; connections bound them

# zlib's window bits by the names of the codings: gzip's header, zlib's header
CODINGS: Mapping[str, int] = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class Bodies:
    def __init__(self, app: ASGIApp, seconds: float, most: int) -> None:
        """`seconds` that each may take; bytes of them all, `most`."""
        self._app = app
        self._seconds = seconds
        self._room = Room(most)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        codings = [value.decode("latin-1") for name, value in scope["headers"] if name == b"content-encoding"]
        named = [part for value in codings for name in value.split(",") if (part := name.strip().lower()) != "identity"]
        body = Pieces(receive, self._seconds).receive
        if named and not (len(named) == 1 and named[0] in CODINGS):
            error = UnsupportedMediaError("Content-Encoding", "is one of gzip, deflate and identity, once")
            await problem_response(Request(scope), error)(scope, receive, send)
            return
        held = Held(Unpacked(body, named[0]).receive if named else body, self._room, scope["state"]["caller"].tenant)
        try:
            await self._app(scope, held.receive, send)
        finally:
            held.release()


class Room:
    """Bytes of bodies in memory. A tenant has as much of it at most as is left free, so there is always some for the
    next: one alone has half of it, two have a third each."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._all = 0
        self._of: Counter[str] = Counter()

    def take(self, tenant: str, size: int) -> None:
        """Raises BodiesFull, and then nothing was taken."""
        if self._of[tenant] + size > self._most - self._all - size:
            raise BodiesFull("too much is being sent just now; send it again, or less at a time")
        self._all += size
        self._of[tenant] += size

    def give(self, tenant: str, size: int) -> None:
        self._all -= size
        self._of[tenant] -= size
        if not self._of[tenant]:
            del self._of[tenant]


class Held:
    """`receive` raises BodiesFull where there is no room for more of this body; what came of it is held to the end."""

    def __init__(self, receive: Receive, room: Room, tenant: str) -> None:
        self._receive = receive
        self._room = room
        self._tenant = tenant
        self._size = 0
        self._counted = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._size += len(message.get("body", b""))
        more = self._size - UNCOUNTED - self._counted
        if more > 0:
            self._room.take(self._tenant, more)
            self._counted += more
        return message

    def release(self) -> None:
        if self._counted:
            self._room.give(self._tenant, self._counted)


class Pieces:
    """`receive` raises BodyTooSlow and BodyTooFine while the body comes; afterwards it is the server's own."""

    def __init__(self, receive: Receive, seconds: float) -> None:
        self._receive = receive
        self._seconds = seconds
        self._started: float | None = None
        self._pieces = 0
        self._size = 0
        self._whole = False

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        if self._started is None:
            self._started = now
        try:
            async with asyncio.timeout_at(self._started + self._seconds + self._size / SLOWEST):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow(f"only {self._size} bytes of the body came in {now - self._started:.0f} s") from None
        self._whole = not message.get("more_body", False)
        self._pieces += 1
        self._size += len(message.get("body", b""))
        check_pieces(self._pieces, self._size)
        return message


def packed(body: bytes, coding: str) -> bytes:
    """The inverse of what `Unpacked` does. Lightly: tensors give little, however long one tries."""
    deflater = zlib.compressobj(1, wbits=CODINGS[coding])
    return deflater.compress(body) + deflater.flush()


def coding_asked(accept: str) -> str | None:
    """What an Accept-Encoding asks for: a coding that it names alone. Libraries name by themselves all that they can
    read; that asks for nothing, and costs more than it gives."""
    named = [name for part in accept.split(",") if (name := _coding(part)) not in ("", "identity")]
    return named[0] if len(named) == 1 and named[0] in CODINGS else None


def _coding(part: str) -> str:
    """Of one entry; "" where its weight refuses it."""
    name, *weights = [word.strip().lower() for word in part.split(";")]
    return "" if any(re.fullmatch(r"q=0(\.0*)?", weight) for weight in weights) else name


def check_pieces(pieces: int, size: int) -> None:
    """Raises BodyTooFine when so many pieces are too many for so many bytes."""
    if pieces > FEW + size // FINE:
        raise BodyTooFine(
            f"the body comes in {pieces} pieces of {size // pieces} bytes on the average; send larger ones"
        )


class Unpacked:
    """`receive` gives the body unpacked, some `AT_ONCE` bytes at a time, so that whoever counts them can stop.

    Raises MalformedError.
    """

    def __init__(self, receive: Receive, coding: str) -> None:
        self._receive = receive
        self._coding = coding
        self._inflater = zlib.decompressobj(CODINGS[coding])
        self._packed = b""
        self._more = True  # packed bytes may come
        self._done = False

    async def receive(self) -> Message:
        if self._done:
            return await self._receive()
        while True:
            if not self._packed and self._more:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._packed, self._more = message.get("body", b""), message.get("more_body", False)
            piece = self._inflate()
            self._done = not self._packed and not self._more and len(piece) < AT_ONCE
            if self._done and not self._inflater.eof:
                raise MalformedError("body", f"its {self._coding} is cut off")
            if piece or self._done:
                await asyncio.sleep(0)  # others are answered between two pieces
                return {"type": "http.request", "body": piece, "more_body": not self._done}

    def _inflate(self) -> bytes:
        try:
            piece = self._inflater.decompress(self._packed, AT_ONCE)
        except zlib.error:
            raise MalformedError("body", f"is not {self._coding}, as Content-Encoding says") from None
        self._packed = self._inflater.unconsumed_tail
        if self._inflater.unused_data:
            raise MalformedError("body", f"goes on after the end of its {self._coding}")
        return piece
