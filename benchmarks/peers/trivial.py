"""The least that a service of this stack can do: `uvicorn benchmarks.peers.trivial:fastapi_app` and its like.

Each reads a body and sends the same number of bytes back. `handing_app` has another thread give them back, which is the
least that a service with an engine can do.
"""

import asyncio
import threading
from queue import SimpleQueue

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

fastapi_app = FastAPI()


@fastapi_app.post("/echo")
async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type="application/octet-stream")


handing_app = FastAPI()
_handed: "SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Future[bytes], bytes]]" = SimpleQueue()


def _give_back() -> None:
    while True:
        loop, future, body = _handed.get()
        loop.call_soon_threadsafe(future.set_result, body)


threading.Thread(target=_give_back, daemon=True).start()


@handing_app.post("/echo")
async def hand(request: Request) -> Response:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bytes] = loop.create_future()
    _handed.put((loop, future, await request.body()))
    return Response(await future, media_type="application/octet-stream")


async def bare_app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    body = body or b"{}"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
