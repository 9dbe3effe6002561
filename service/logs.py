"""What the operator reads: one line a request. Never what a request said."""

import logging
import re
import secrets
import sys
import time

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem_response
from service.worker import ReaderGone

CLIENT_GONE = 499  # nginx's name for a request whose client left
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

access = logging.getLogger("keypast.access")
logger = logging.getLogger("keypast.service")


def configure(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger("keypast")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


PROBES = {"/livez", "/readyz", "/health"}  # asked every few seconds, and of no interest when they answer


class RequestLog:
    """The outermost layer: gives each request its id, answers what nobody caught, and writes the line.

    A HEAD request runs as GET; the server leaves out the body. What never ends looks at `only_head`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        method = scope["method"]
        scope = {**scope, "method": "GET" if method == "HEAD" else method}
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "only_head": method == "HEAD"}
        header = (b"x-request-id", request_id.encode())
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], header]
            await send(message)

        started = time.perf_counter()
        try:
            await self._app(scope, receive, send_with_id)
        except ReaderGone:
            status = CLIENT_GONE
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if status == 0:
                await problem_response(Request(scope), error)(scope, receive, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
            if access.isEnabledFor(level):
                elapsed = (time.perf_counter() - started) * 1e3
                access.log(level, "%s %s %s %d %.1f ms", request_id, method, scope["path"], status, elapsed)
