"""Who asks. Every request passes here before anything else is looked at; what has no key of its own is refused, routes
that are yet to be written included.

Without keys everybody is the same tenant, and nobody is an admin; such a service listens on this machine only.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from keypast.keys import KeyRecord, KeysError, Role, find_key, parse_keys, read_keys
from service.errors import Forbidden, Unauthorized, problem_response
from service.limits import RequestRate, Turnstile
from service.logs import logger

PUBLIC = {"/livez", "/readyz"}  # what a load balancer asks; they say nothing of anybody
METRICS = "/metrics"  # of everybody's sessions together
WATCHED = {*PUBLIC, METRICS}  # who watches the service waits for nobody's turn
LOOK_EVERY = 1.0  # seconds between two looks at the file


class Caller(NamedTuple):
    tenant: str
    role: Role | None
    key_id: str | None


ANYBODY = Caller("", None, None)


class KeyRing:
    """The keys of the environment and of a file, which is read again when it changes.

    A file that cannot be read any more leaves the keys as they were, and the log says so; one that is gone takes its
    keys along.

    Raises KeysError at the start, when there is a file and it cannot be read.
    """

    def __init__(
        self,
        fixed: str = "",
        file: Path | None = None,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.exist = bool(fixed.strip()) or file is not None
        self._fixed = parse_keys(fixed)
        self._file = file
        self._clock = clock
        self._timer = timer
        self._look_at = timer() + LOOK_EVERY
        self._seen = self._mark()
        if file is not None and self._seen is None:
            raise KeysError(f"{file} is not there; make it with: keypast keys new TENANT --file {file}")
        self._keys: Mapping[str, KeyRecord] = self._read()

    def caller(self, headers: Headers) -> Caller:
        """Whose key the request has; any one of them when it has the same twice. Raises Unauthorized."""
        if not self.exist:
            return ANYBODY
        self._follow()
        sent = set(headers.getlist("x-api-key"))
        for value in headers.getlist("authorization"):
            scheme, _, key = value.partition(" ")
            sent.add(key.strip() if scheme.lower() == "bearer" else "")
        found = find_key(self._keys, sent.pop(), self._clock()) if len(sent) == 1 else None
        if found is None:
            raise Unauthorized
        return Caller(found.tenant, found.role, found.id)

    def _follow(self) -> None:
        now = self._timer()
        if self._file is None or now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        mark = self._mark()
        if mark == self._seen:
            return
        self._seen = mark
        try:
            self._keys = self._read()
            logger.info("the keys have changed: %d are valid", len(self._keys))
        except KeysError as error:
            logger.error("the keys stay as they were: %s", error)

    def _mark(self) -> tuple[int, int, int] | None:
        """What is another when the file is; None when it is not there."""
        if self._file is None:
            return None
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> Mapping[str, KeyRecord]:
        if self._file is None or self._seen is None:
            return self._fixed
        try:
            return {**self._fixed, **read_keys(self._file)}
        except KeysError as error:
            raise KeysError(f"{self._file}: {error}") from None
        except OSError as error:
            raise KeysError(f"{self._file} cannot be read: {error.strerror or error}") from None


class Authenticate:
    """Lets through who has a key, within its tenant's rate and in its turn, and says who it is:
    `scope["state"]["caller"]`."""

    def __init__(self, app: ASGIApp, keys: KeyRing, rate: RequestRate, turnstile: Turnstile) -> None:
        self._app = app
        self._keys = keys
        self._rate = rate
        self._turnstile = turnstile

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # nothing here speaks it
        elif (refusal := self._refuses(scope)) is not None:
            await problem_response(Request(scope), refusal)(scope, receive, send)
        else:
            if scope["path"] not in WATCHED and (seconds := self._turnstile.wait_seconds(_caller(scope).tenant)):
                await asyncio.sleep(seconds)
            await self._app(scope, receive, send)

    def _refuses(self, scope: Scope) -> Exception | None:
        scope["state"]["caller"] = ANYBODY
        if scope["path"] in PUBLIC:
            return None
        try:
            caller = self._keys.caller(Headers(scope=scope))
            scope["state"]["caller"] = caller
            if caller.role == "metrics" and scope["path"] != METRICS:
                return Forbidden("this key reads /metrics alone")
            self._rate.take(caller.tenant)
        except Exception as refusal:
            return refusal
        return None


def _caller(scope: Scope) -> Caller:
    caller: Caller = scope["state"]["caller"]
    return caller


def caller_of(request: Request) -> Caller:
    return _caller(request.scope)


async def tenant(request: Request) -> str:
    """Whose sessions the request may see. One place; every route asks here."""
    return caller_of(request).tenant


async def admin(request: Request) -> Caller:
    """Raises Forbidden."""
    caller = caller_of(request)
    if caller.role != "admin":
        raise Forbidden("this is for an admin's key: keypast keys new TENANT --role admin")
    return caller


async def metrics_reader(request: Request) -> None:
    """Raises Forbidden. Where there are no keys, everybody may."""
    if caller_of(request).role == "user":
        raise Forbidden("this is for a key that reads metrics: keypast keys new TENANT --role metrics")


Tenant = Annotated[str, Depends(tenant)]
Admin = Annotated[Caller, Depends(admin)]
