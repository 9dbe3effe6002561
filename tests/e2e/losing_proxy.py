"""A TCP proxy that loses replies: the service has done its work and answered, and the client never hears of it."""

import socket
import struct
import threading
from contextlib import closing, suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class LosingProxy:
    """`lose` is how many of the next replies are lost, each whole but for its first `keep` bytes; `lost` are those.
    It speaks HTTP/1.1 with declared lengths or in chunks, one exchange a connection."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closing = False
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lose = 0
        self.keep = 0
        self.lost: list[bytes] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing = True
        with suppress(OSError):
            socket.create_connection(self._listener.getsockname()).close()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._closing:
                client.close()
                return
            thread = threading.Thread(target=self._exchange, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _exchange(self, client: socket.socket) -> None:
        with closing(client), closing(socket.create_connection(self._upstream)) as upstream, suppress(OSError):
            request = _read(client)
            if not request:
                return
            upstream.sendall(request)
            reply = _read(upstream)
            if self.lose:
                self.lose -= 1
                self.lost.append(reply)
                client.sendall(reply[: self.keep])
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no goodbye
            else:
                client.sendall(reply)


def _read(side: socket.socket) -> bytes:
    """One message: its head, and as much of a body as it declares, or all of its chunks."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = side.recv(1 << 16)
        if not chunk:
            return b""
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    length = int(fields.get(b"content-length", b"0"))
    chunked = b"chunked" in fields.get(b"transfer-encoding", b"")
    while len(body) < length or (chunked and not body.endswith(b"0\r\n\r\n")):
        body += side.recv(1 << 16)
    return head + b"\r\nConnection: close\r\n\r\n" + body
