"""The client's core: calls built and replies parsed, without I/O. `client` and `aio` are thin shells over it.

arguments > Call (method, path, query, headers, body, parse) > a shell's HTTP > Response > Call.parse > result
"""

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from os import environ
from secrets import token_hex
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from pydantic import BaseModel
from pydantic_core import to_json

from keypast import schemas, wire
from keypast.batch import read_outcomes, write_steps
from keypast.errors import (
    ConnectFailed,
    KeypastError,
    ProtocolError,
    Refused,
    ServerError,
    StatusError,
    TimedOut,
    TransportError,
    from_problem,
    invalid_input,
)
from keypast.past import Past
from keypast.wire import Array

T = TypeVar("T")
U = TypeVar("U")
Model = TypeVar("Model", bound=BaseModel)
Append = TypeVar("Append", bound=schemas.AppendRequest)

DEFAULT_URL = "http://127.0.0.1:8000"
# A long prefill computes for minutes without a byte on the line; connecting and sending do not take that long.
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0, write=60.0)
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100)
PIECE = 1 << 20  # bytes of a long body that are sent at a time
KEY = "Idempotency-Key"
GATEWAY = (502, 504)  # a proxy had no answer of the service


def resolve_url(base_url: str | None, environment: Mapping[str, str] = environ) -> str:
    """The argument, else the environment's KEYPAST_URL, else the local service. Raises ValueError: not an address."""
    url = base_url or environment.get("KEYPAST_URL") or DEFAULT_URL
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is not an address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f"the service's address is http:// or https:// and a host, not {url!r}")
    return url


def authorized(
    headers: Mapping[str, str] | None, api_key: str | None, environment: Mapping[str, str] = environ
) -> dict[str, str]:
    """The headers, and the key: the argument, else the environment's KEYPAST_API_KEY, else none. A header wins.

    Raises ValueError: not a key.
    """
    given = dict(headers or {})
    key = environment.get("KEYPAST_API_KEY") if api_key is None else api_key
    if not key or {name.lower() for name in given} & {"authorization", "x-api-key"}:
        return given
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("the API key (api_key or KEYPAST_API_KEY) has characters that no key has")
    return {**given, "Authorization": f"Bearer {key}"}


@dataclass(frozen=True, slots=True)
class Response:
    """`headers` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and how to read its reply; `parse` raises what the reply says. `reads`: it changes nothing."""

    method: str
    path: str
    parse: Callable[[Response], T]
    query: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    reads: bool = False

    @property
    def repeatable(self) -> bool:
        """Whether it may come twice: it reads, or has a key, or (PATCH) says how things shall be."""
        return self.reads or self.method in ("GET", "PATCH") or KEY in self.headers

    def once(self, key: str | None = None) -> "Call[T]":
        """With a key of the caller's or else of its own, by which the service knows it again. Raises InvalidInput."""
        try:
            given = None if key is None else wire.parse_key([key])
        except wire.WireError as error:
            raise invalid_input("idempotency_key", error.message) from None
        return replace(self, headers={**self.headers, KEY: given or token_hex(16)})

    def then(self, convert: Callable[[T], U]) -> "Call[U]":
        def parse(response: Response) -> U:
            return convert(self.parse(response))

        return Call(self.method, self.path, parse, self.query, self.headers, self.body, self.reads)


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A long body. In one piece it would take minutes, since all that is left of it is copied at every write."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        for at in range(0, len(self._body), PIECE):
            yield self._body[at : at + PIECE]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


def build(http: httpx.Client | httpx.AsyncClient, call: Call[Any]) -> httpx.Request:
    """The call for a shell to send."""
    request = http.build_request(call.method, call.path, params=call.query, headers=call.headers, content=call.body)
    if len(call.body) > PIECE:
        request.stream = Pieces(call.body)
    return request


@dataclass(frozen=True, slots=True)
class Retries:
    """A call is sent again when nothing of it can have been applied: the connection failed, or the service refused it
    (429, 503) and said when to come back. When no answer came it may have been applied, so then only one that is
    `repeatable` is: with its key, the service gives the first reply again."""

    limit: int = 2  # tries after the first
    longest_wait: float = 30.0  # seconds; a longer Retry-After is the caller's to wait for

    def wait(self, tried: int, error: KeypastError, *, repeatable: bool = False) -> float | None:
        """Seconds to wait before trying again after `tried` failures before this one; None: raise it."""
        if tried >= self.limit:
            return None
        unanswered = isinstance(error, TransportError) or (isinstance(error, ServerError) and error.status in GATEWAY)
        if isinstance(error, ConnectFailed) or (repeatable and unanswered):
            return min(0.1 * 2.0**tried, self.longest_wait)
        if isinstance(error, Refused) and error.retry_after is not None:
            return error.retry_after if error.retry_after <= self.longest_wait else None
        return None


def transport_error(error: httpx.RequestError, address: httpx.URL | None = None) -> TransportError:
    """`address` is where the call should have gone."""
    message = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        where = "" if address is None else f" to {address}"
        return ConnectFailed(f"cannot connect{where}: {message}")
    if isinstance(error, httpx.TimeoutException):
        return TimedOut(f"no reply in time, the call may have been applied: {message}")
    return TransportError(f"the connection broke, the call may have been applied: {message}")


# ---- replies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AppendResult:
    """What a prefill, a step or a score gave. Lists have one entry a row; what was not asked for is None.

    `computed` positions for this call and `reused` ones of the past are the valid length; `shared` are those of the
    reused whose memory another session held too.

    attn_out (B, n, H); attn_weights (B, n, T + E), or (B, N, n, T + E) a head, E the layer's own keys; logits (B, V) or
    (B, n, V).
    """

    past_length: list[int]
    valid_length: list[int]
    version: int
    computed: list[int]
    reused: list[int]
    shared: list[int]
    timings: schemas.Timings
    attn_out: Array | None = None
    attn_weights: Array | None = None
    logits: Array | None = None
    next_token: list[int | None] | None = None
    text: list[str] | None = None
    top_logprobs: list[list[schemas.TopLogprob]] | None = None
    token_logprobs: list[list[float | None]] | None = None  # of the tokens given
    replayed: bool = False  # done before, by the same key or version: this is the first reply again


def check(response: Response) -> None:
    """Raises the StatusError of a reply that is not a success."""
    if response.status >= 400:
        raise status_error(response)
    if response.status >= 300:
        raise ProtocolError(f"a redirect ({response.status}); give the service's own address")


def status_error(response: Response) -> StatusError:
    problem = _problem(response)
    if problem.retry_after is None:
        problem = problem.model_copy(update={"retry_after": _seconds(response.headers.get("retry-after"))})
    return from_problem(problem)


def _problem(response: Response) -> schemas.Problem:
    """A proxy's error page has a status and nothing else to go by."""
    try:
        return wire.validated(schemas.Problem, response.body)
    except wire.WireError:
        known = {status.value: status.phrase for status in HTTPStatus}
        title = known.get(response.status, "Error")
        detail = f"{response.status} {title}, without a problem in the body"
        error = schemas.ErrorBody(message=detail, type="server_error")
        return schemas.Problem(title=title, status=response.status, detail=detail, code="", error=error)


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, depends on two clocks and is not waited for."""
    if retry_after is None or not retry_after.strip().isdecimal():
        return None
    return float(retry_after)


def parse_model(model: type[Model]) -> Callable[[Response], Model]:
    def parse(response: Response) -> Model:
        check(response)
        try:
            return wire.validated(model, response.body)
        except wire.WireError as error:
            raise ProtocolError(f"not the reply that was expected: {error}") from None

    return parse


def parse_append(response: Response) -> AppendResult:
    check(response)
    try:
        reply, arrays = wire.read_reply(response.headers.get("content-type"), response.body)
    except wire.WireError as error:
        raise ProtocolError(f"not the reply that was expected: {error}") from None
    return append_result(reply, arrays, replayed=was_replayed(response.headers))


def append_result(reply: schemas.AppendReply, arrays: Mapping[str, Array], *, replayed: bool) -> AppendResult:
    outputs = reply.outputs
    return AppendResult(
        past_length=reply.past_length,
        valid_length=reply.valid_length,
        version=reply.version,
        computed=reply.computed,
        reused=reply.reused,
        shared=reply.shared,
        timings=reply.timings,
        attn_out=arrays.get("attn_out"),
        attn_weights=arrays.get("attn_weights"),
        logits=arrays.get("logits"),
        next_token=outputs.next_token,
        text=outputs.text,
        top_logprobs=outputs.top_logprobs,
        token_logprobs=outputs.token_logprobs,
        replayed=replayed,
    )


def parse_outcomes(response: Response) -> list[AppendResult | StatusError]:
    check(response)
    try:
        outcomes = read_outcomes(response.headers.get("content-type"), response.body)
    except wire.WireError as error:
        raise ProtocolError(f"not the reply that was expected: {error}") from None
    results: list[AppendResult | StatusError] = []
    for told, arrays in outcomes:
        if told.reply is not None:
            results.append(append_result(told.reply, arrays, replayed=told.replayed))
        elif told.problem is not None:
            results.append(from_problem(told.problem))
        else:
            raise ProtocolError("not the reply that was expected: an item has neither a reply nor a problem")
    return results


def parse_generated(response: Response) -> schemas.GenerateReply:
    reply = parse_model(schemas.GenerateReply)(response)
    reply._replayed = was_replayed(response.headers)
    return reply


def was_replayed(headers: Mapping[str, str]) -> bool:
    return headers.get("idempotent-replayed") == "true"


def parse_past(response: Response) -> tuple[Past, int]:
    """And the session's version."""
    check(response)
    try:
        version = wire.parse_if_match(response.headers.get("etag"))
        past = Past.from_bytes(response.body)
    except wire.WireError as error:
        raise ProtocolError(f"not the past that was expected: {error}") from None
    if version is None:
        raise ProtocolError("not the past that was expected: it has no ETag")
    return past, version


def parse_ready(response: Response) -> bool:
    if response.status == HTTPStatus.SERVICE_UNAVAILABLE:
        return False
    check(response)
    return True


# ---- calls ----------------------------------------------------------------------------------------------------------


def request_of(model: type[Model], options: Mapping[str, Any]) -> Model:
    """Raises InvalidInput for what the service would refuse by its schema."""
    try:
        return wire.validated(model, dict(options))
    except wire.WireError as error:
        raise invalid_input(error.field, error.message) from None


def get(path: str, model: type[Model], query: dict[str, Any] | None = None) -> Call[Model]:
    return Call("GET", path, parse_model(model), query or {})


def post(path: str, request: BaseModel, model: type[Model], if_match: int | None = None) -> Call[Model]:
    body = to_json(request.model_dump(exclude_unset=True, exclude_none=True))
    return Call("POST", path, parse_model(model), {}, _headers(wire.JSON_TYPE, wire.JSON_TYPE, if_match), body)


def patch(path: str, request: BaseModel, model: type[Model], if_match: int | None = None) -> Call[Model]:
    """A merge patch: what was given as None is sent as null."""
    body = to_json(request.model_dump(exclude_unset=True))
    return Call("PATCH", path, parse_model(model), {}, _headers(wire.JSON_TYPE, wire.JSON_TYPE, if_match), body)


def session_path(session_id: str, verb: str = "") -> str:
    return f"/v1/sessions/{quote(session_id, safe='')}" + (f"/{verb}" if verb else "")


APPENDS: dict[str, type[schemas.AppendRequest]] = {
    "prefill": schemas.PrefillRequest,
    "step": schemas.StepRequest,
    "score": schemas.ScoreRequest,
}


def append(
    session_id: str, verb: str, inputs: Mapping[str, Any], *, binary: bool, if_match: int | None = None
) -> Call[AppendResult]:
    """`verb` is one of APPENDS. Binary: arrays, and logits in the reply, travel as safetensors, else as base64."""
    request, arrays = _split(APPENDS[verb], inputs)
    encoded = wire.write_append(request, arrays, "safetensors" if binary else "base64")
    wants_tensors = binary and (arrays or request.logits != "none")
    headers = _headers(encoded.content_type, wire.SAFETENSORS_TYPE if wants_tensors else wire.JSON_TYPE, if_match)
    query: dict[str, Any] = dict(encoded.query)
    return Call("POST", session_path(session_id, verb), parse_append, query, headers, encoded.body)


def batch_step(
    steps: Sequence[tuple[str, Mapping[str, Any], int | None]], *, binary: bool
) -> Call[list[AppendResult | StatusError]]:
    """Each a session's id, its inputs and the version expected."""
    items = []
    for session_id, inputs, if_match in steps:
        request, arrays = _split(schemas.BatchStep, {**inputs, "session_id": session_id, "if_match": if_match})
        items.append((request, arrays))
    encoded = write_steps(items, binary=binary)
    asks = any(arrays or request.logits != "none" for request, arrays in items)
    headers = _headers(encoded.content_type, wire.SAFETENSORS_TYPE if binary and asks else wire.JSON_TYPE, None)
    return Call("POST", "/v1/batch/step", parse_outcomes, {}, headers, encoded.body)


def get_past(session_id: str, if_match: int | None = None) -> Call[tuple[Past, int]]:
    headers = {"Accept": wire.SAFETENSORS_TYPE, **_precondition(if_match)}
    return Call("GET", session_path(session_id, "past"), parse_past, headers=headers)


def put_past(session_id: str, past: Past, if_match: int | None = None) -> Call[schemas.SessionView]:
    """Raises InvalidInput for an array that cannot travel."""
    try:
        body = past.to_bytes()
    except wire.WireError as error:
        raise invalid_input(error.field, error.message) from None
    headers = _headers(wire.SAFETENSORS_TYPE, wire.JSON_TYPE, if_match)
    return Call("PUT", session_path(session_id, "past"), parse_model(schemas.SessionView), {}, headers, body)


def stream(session_id: str, request: schemas.GenerateRequest, if_match: int | None = None) -> Call[None]:
    """Its `parse` only checks the status; the body is for a StreamReader."""
    call = post(session_path(session_id, "generate"), request, schemas.GenerateReply, if_match)
    return replace(call.then(lambda _: None), parse=check, headers=call.headers | {"Accept": "text/event-stream"})


def _headers(content_type: str, accept: str, if_match: int | None) -> dict[str, str]:
    return {"Content-Type": content_type, "Accept": accept, **_precondition(if_match)}


def _precondition(if_match: int | None) -> dict[str, str]:
    return {} if if_match is None else {"If-Match": wire.etag(if_match)}


def _split(model: type[Append], inputs: Mapping[str, Any]) -> tuple[Append, dict[str, Array]]:
    """The request without its tensors, and those as arrays. Raises InvalidInput."""
    arrays = {name: as_array(name, inputs[name]) for name in wire.ARRAY_INPUTS if inputs.get(name) is not None}
    lists = {name: _as_lists(inputs[name]) for name in wire.LIST_INPUTS if inputs.get(name) is not None}
    rest = {name: value for name, value in inputs.items() if name not in wire.ARRAY_INPUTS + wire.LIST_INPUTS}
    return request_of(model, {**rest, **lists}), arrays


# ---- arguments ------------------------------------------------------------------------------------------------------


def as_array(name: str, value: Any) -> Array:  # noqa: ANN401 - a numpy array, a torch tensor or nested numbers
    """In a dtype that travels: float64 is narrowed to float32, small ints widened to int32, bfloat16 to float32.

    A torch tensor is recognised by what it can do; torch is not imported. Raises InvalidInput.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    try:
        array: Array = np.asarray(value)
    except ValueError:
        raise invalid_input(name, "rows differ in length") from None
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
    if array.dtype.kind in "iu" and array.dtype != np.uint8 and np.can_cast(array.dtype, np.int32):
        return array.astype(np.int32)
    if array.dtype.kind == "O" or array.dtype.name not in ("float16", "float32", "int32", "int64", "uint8", "bool"):
        raise invalid_input(name, f"an array of {array.dtype.name} cannot travel")
    return array


def _as_lists(value: Any) -> Any:  # noqa: ANN401 - nested ints, or an array or tensor of them
    return value.tolist() if hasattr(value, "tolist") else value
