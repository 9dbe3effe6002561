"""One request by hand, for what httpx does not do in process: leave early, read a stream as it comes."""

import asyncio
import json
from typing import Any

from fastapi import FastAPI
from starlette.types import Message


class RawRequest:
    """`status`, 0 before it is known; `body` as far as it has come; `leave` closes the connection. A reader that is not
    `reading` takes nothing more. POST with a body, else GET."""

    def __init__(
        self, app: FastAPI, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> None:
        self.status = 0
        self.reading = asyncio.Event()
        self.reading.set()
        self.body = b""
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": json.dumps(body or {}).encode(), "more_body": False})
        sent = {"content-type": "application/json"} | (headers or {})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET" if body is None else "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), text.encode()) for name, text in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("k", 80),
        }
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._send))

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Message) -> None:
        await self.reading.wait()
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")
