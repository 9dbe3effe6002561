"""The least that a service of this stack can do: `uvicorn benchmarks.peers.trivial:fastapi_app` or `:bare_app`.

Both read a body and send the same number of bytes back.
"""

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

fastapi_app = FastAPI()


@fastapi_app.post("/echo")
async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type="application/octet-stream")


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
