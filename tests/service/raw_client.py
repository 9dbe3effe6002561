"""One request by hand, for what httpx does not do in process: leave early, read a stream as it comes."""

import asyncio
import json
from typing import Any

from fastapi import FastAPI
from starlette.types import Message


class RawRequest:
    """`status`, 0 before it is known; `body` as far as it has come; `leave` closes the connection."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]) -> None:
        self.status = 0
        self.body = b""
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("k", 80),
        }
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._send))

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Message) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")
