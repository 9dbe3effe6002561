"""How much of a request is read, and how many requests. Depth of nesting needs no limit here: pydantic's parser stops
at 200 levels. How many names a body has is counted where it is parsed."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from engine.errors import QueueFull, QuotaExceeded
from engine.turns import GUARDED
from keypast.wire import JSON_TYPE, SAFETENSORS_TYPE, UnsupportedMediaError, is_safetensors, validated
from service.errors import BodyTooLarge
from service.settings import Settings
from service.worker import ReaderGone

Model = TypeVar("Model", bound=BaseModel)

LARGE = 4 << 20  # bytes whose joining is worth a thread; it lets go of the interpreter meanwhile
SMALL = 4 << 10  # bytes: smaller pieces are put together at once, since each would cost more than it holds
TOGETHER = 64 << 10


class RequestRate:
    """How many requests a tenant may make: they are worked off steadily, and a minute's worth may come at once."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_minute`: 0 for no bound."""
        self._per_minute = per_minute
        self._clock = clock
        self._made: dict[str, tuple[float, float]] = {}  # and when

    def take(self, tenant: str) -> None:
        """One more. Raises QuotaExceeded, with the seconds until there may be one."""
        if not self._per_minute:
            return
        now = self._clock()
        made, at = self._made.get(tenant, (0.0, now))
        made = max(0.0, made - (now - at) * self._per_minute / 60)
        if over := max(0.0, made + 1 - self._per_minute):
            self._made[tenant] = made, now
            message = f"the quota is {self._per_minute} requests a minute"
            raise QuotaExceeded(message, over * 60 / self._per_minute)
        self._made[tenant] = made + 1, now


class Turnstile:
    """While a tenant with a guarantee is at work, the requests of all others come in one after the other, so that the
    event loop has time for its own. They wait in the order in which they came; nobody is refused.
    """

    def __init__(
        self, guaranteed: Collection[str], per_second: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`per_second`: 0 for no bound."""
        self._guaranteed = frozenset(guaranteed) if per_second else frozenset()
        self._gap = 1 / max(1, per_second)
        self._clock = clock
        self._until = self._next = -math.inf

    def wait_seconds(self, tenant: str) -> float:
        """How long a request that comes now has to wait."""
        if not self._guaranteed:
            return 0.0
        now = self._clock()
        if tenant in self._guaranteed:
            self._until = now + GUARDED
            return 0.0
        if now >= self._until:
            return 0.0
        self._next = max(self._next + self._gap, now)
        return self._next - now


class OpenStreams:
    """How many streams each tenant has open."""

    def __init__(self, per_tenant: int) -> None:
        self._per_tenant = per_tenant
        self._open: Counter[str] = Counter()

    @contextmanager
    def one(self, tenant: str) -> Iterator[None]:
        """While it is open. Raises QueueFull."""
        if self._open[tenant] >= self._per_tenant:
            raise QueueFull(f"{self._per_tenant} streams are open already; close one")
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]


def body_limit(request: Request, settings: Settings) -> int:
    """Bytes that the body may have. Of JSON less, since it takes many times its size once it is parsed.

    Raises UnsupportedMediaError.
    """
    binary = is_safetensors(request.headers.get("content-type"))
    return settings.max_body_bytes if binary else json_limit(settings)


def json_limit(settings: Settings) -> int:
    return min(settings.max_json_bytes, settings.max_body_bytes)


async def read_json(request: Request, model: type[Model], limit: int, own_type: str | None = None) -> Model:
    """A body that can only be JSON, also under a media type of its own.

    Raises WireError and its children, BodyTooLarge, BodyTooSlow, BodyTooFine, BodiesFull, ReaderGone.
    """
    return validated(model, await json_body(request, limit, own_type))


async def json_body(request: Request, limit: int, own_type: str | None = None) -> bytes:
    """What should be JSON. Raises UnsupportedMediaError, and what `read_body` raises."""
    named = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if named != own_type and is_safetensors(request.headers.get("content-type")):
        raise UnsupportedMediaError("Content-Type", f"{SAFETENSORS_TYPE} is for tensors only; send {JSON_TYPE}")
    return await read_body(request, limit)


async def read_body(request: Request, limit: int) -> bytes:
    """Refuses a longer body before reading it when its length is declared, else at the byte that is too many.

    Raises BodyTooLarge, BodyTooSlow, BodyTooFine, BodiesFull, MalformedError (badly packed), ReaderGone.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise BodyTooLarge(limit)
    parts: list[bytes | bytearray] = []
    size, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ReaderGone
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge(limit)
        if not parts and not more:
            return chunk
        _put(parts, chunk)
    return b"".join(parts) if size < LARGE else await asyncio.to_thread(b"".join, parts)


def _put(parts: list[bytes | bytearray], chunk: bytes) -> None:
    last = parts[-1] if parts else None
    if not chunk:
        return
    if len(chunk) >= SMALL or last is None:
        parts.append(chunk)
    elif isinstance(last, bytearray) and len(last) < TOGETHER:
        last += chunk
    else:
        parts.append(bytearray(chunk))
