"""What makes a request itself: its key, and the digest of all that it asks for."""

import hashlib
from collections.abc import Mapping
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from engine.batch import Once
from keypast.schemas import BatchStep
from keypast.wire import ARRAY_INPUTS, Array, digest, parse_key, validated
from service.limits import json_body

Model = TypeVar("Model", bound=BaseModel)

REPLAYED = "Idempotent-Replayed"


def once_of(request: Request, body: bytes = b"") -> Once:
    """The digest is over method, path, query (in any order) and the body, byte for byte: what is answered, not how (the
    reply's form is each request's own). Headers such as If-Match do not count. Raises WireError."""
    key = parse_key(request.headers.getlist("idempotency-key"))
    asked = repr((request.method, request.scope["path"], _query(request)))
    return Once(hashlib.sha256(asked.encode() + body).digest(), key)


def once_of_step(request: Request, step: BatchStep, arrays: Mapping[str, Array]) -> Once:
    """Of one step of a batch, which has the batch's key: keys are kept per session. The digest is over what the step
    asks for; the version that it expects does not count. Raises WireError."""
    options = step.model_dump(mode="json", exclude_unset=True, exclude={*ARRAY_INPUTS, "if_match"})
    asked = repr((request.scope["path"], sorted(options.items()), digest(arrays)))
    return Once(hashlib.sha256(asked.encode()).digest(), parse_key(request.headers.getlist("idempotency-key")))


async def read_change(request: Request, model: type[Model], limit: int) -> tuple[Model, Once]:
    """A JSON body, and what makes the request itself. Raises as `read_json` does."""
    body = await json_body(request, limit)
    return validated(model, body), once_of(request, body)


def replay_headers(once: Once) -> dict[str, str]:
    return {REPLAYED: "true"} if once.replayed else {}


def _query(request: Request) -> list[tuple[str, str]]:
    return sorted(request.query_params.multi_items()) if request.scope["query_string"] else []
