"""What the operator reads: a line for each request, and one for each session that is made, goes, or leaves the service.
Never what a request said, nor a key: of a key its id, and of an error that nobody foresaw where it arose, not what it
says, unless it is the engine's own.
"""

import json
import logging
import random
import re
import sys
import time
import traceback
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Literal

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem_response
from service.traffic import Traffic
from service.worker import ReaderGone

CLIENT_GONE = 499  # nginx's name for a request whose client left
LONGEST_PATH = 256  # characters of a path that are logged
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ids = random.Random()  # they tell requests apart, and are nobody's secret

Action = Literal["create", "delete", "export", "import", "fork", "drain"]

ENGINE = "keypast.worker"  # its errors are the engine's own

access = logging.getLogger("keypast.access")
audits = logging.getLogger("keypast.audit")
logger = logging.getLogger("keypast.service")


def configure(level: str, form: Literal["auto", "json", "text"] = "auto") -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextLines("%(asctime)s %(levelname)-7s %(name)s: %(message)s") if text else JsonLines())
    for name, least in (("keypast", level.upper()), ("uvicorn", "WARNING"), ("opentelemetry", "WARNING")):
        root = logging.getLogger(name)
        root.handlers[:] = [handler]
        root.setLevel(least)
        root.propagate = False
    audits.setLevel(logging.INFO)


class TextLines(logging.Formatter):
    """A line holds one record: what it was told is shown without line breaks and control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        line = self.formatMessage(self._filled(record))
        if record.exc_info is None:
            return line
        return "\n".join([line, *_where(record.exc_info[1], words=record.name == ENGINE)])

    def _filled(self, record: logging.LogRecord) -> logging.LogRecord:
        record.message, record.asctime = record.getMessage(), self.formatTime(record)
        return record


class JsonLines(logging.Formatter):
    """An object a line: `time`, `level`, `logger`, `message`, and a record's own `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            told["error"] = _where(record.exc_info[1], words=record.name == ENGINE)
        return json.dumps(told)


def _where(error: BaseException | None, *, words: bool = False) -> list[str]:
    """The kinds of an error and of its causes, each after the places it passed. Their words may be a request's."""
    lines: list[str] = []
    while error is not None:
        frames = [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
        ]
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        lines[:0] = [*frames, f"{kind}: {error}" if words else kind]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return lines


def audit(request: Request, action: Action, session: str | None = None, **fields: object) -> None:
    """Who did it, to which session. Written at every log level."""
    caller = request.state.caller
    told = {"action": action, "session": session, "tenant": caller.tenant, "key": caller.key_id, **fields}
    told["request_id"] = request.state.request_id
    shown = " ".join(f"{name}={value}" for name, value in told.items() if value not in (None, ""))
    audits.info("%s", shown, extra={"fields": {name: value for name, value in told.items() if value is not None}})


PROBES = {"/livez", "/readyz", "/health", "/metrics"}  # asked every few seconds, and of no interest when they answer


class RequestLog:
    """The outermost layer: gives each request its id, answers what nobody caught, writes the line, and counts.

    A HEAD request runs as GET; the server leaves out the body. What never ends looks at `only_head`.
    """

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"{_ids.getrandbits(64):016x}"
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
        self._traffic.began()
        try:
            await self._app(scope, receive, send_with_id)
        except ReaderGone:
            status = CLIENT_GONE
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if status == 0:
                await problem_response(Request(scope), error)(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            self._traffic.ended(scope, method, status, seconds)
            quiet = scope["path"] in PROBES and status != HTTPStatus.UNAUTHORIZED
            level = logging.DEBUG if quiet else logging.INFO
            if access.isEnabledFor(level):
                _write_line(level, scope, method, status, seconds * 1e3)


def _write_line(level: int, scope: Scope, method: str, status: int, ms: float) -> None:
    request_id, path = scope["state"]["request_id"], scope["path"][:LONGEST_PATH]
    caller = scope["state"].get("caller")
    fields = {"request_id": request_id, "method": method, "path": path, "status": status, "ms": round(ms, 1)}
    if caller is not None and caller.key_id is not None:
        fields |= {"tenant": caller.tenant, "key": caller.key_id}
    access.log(level, "%s %s %s %d %.1f ms", request_id, method, path, status, ms, extra={"fields": fields})
