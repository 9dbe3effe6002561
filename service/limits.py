"""How much of a request is read. Depth of nesting needs no limit here: pydantic's parser stops at 200 levels."""

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from keypast.wire import JSON_TYPE, SAFETENSORS_TYPE, UnsupportedMediaError, is_safetensors, validated
from service.errors import BodyTooLarge
from service.worker import ReaderGone

Model = TypeVar("Model", bound=BaseModel)

LARGE = 4 << 20  # bytes whose joining is worth a thread; it lets go of the interpreter meanwhile


async def read_json(request: Request, model: type[Model], limit: int, own_type: str | None = None) -> Model:
    """A body that can only be JSON, also under a media type of its own.

    Raises WireError and its children, BodyTooLarge, ReaderGone.
    """
    return validated(model, await json_body(request, limit, own_type))


async def json_body(request: Request, limit: int, own_type: str | None = None) -> bytes:
    """What should be JSON. Raises UnsupportedMediaError, BodyTooLarge, ReaderGone."""
    named = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if named != own_type and is_safetensors(request.headers.get("content-type")):
        raise UnsupportedMediaError("Content-Type", f"{SAFETENSORS_TYPE} is for tensors only; send {JSON_TYPE}")
    return await read_body(request, limit)


async def read_body(request: Request, limit: int) -> bytes:
    """Refuses a longer body before reading it when its length is declared, else at the byte that is too many.

    Raises BodyTooLarge, ReaderGone.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise BodyTooLarge(limit)
    chunks = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise BodyTooLarge(limit)
            chunks.append(chunk)
    except ClientDisconnect:
        raise ReaderGone from None
    if len(chunks) == 2 and not chunks[1]:
        return chunks[0]
    return b"".join(chunks) if size < LARGE else await asyncio.to_thread(b"".join, chunks)
