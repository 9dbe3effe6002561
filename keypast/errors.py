"""Everything the client raises on purpose, as one tree.

    KeypastError
    ├── TransportError             no whole reply came; unless said otherwise the call may have been applied
    │   ├── ConnectFailed          nothing was sent, so nothing was applied
    │   ├── TimedOut               sent, and no reply in time
    │   └── StreamBroken           a stream ended before its end; the session keeps what was committed
    ├── ProtocolError              the reply is not of this contract: another service, or a newer one
    └── StatusError                the service refused     (`status`, `code`, `detail`, `request_id`)
        ├── InvalidInput           400 405 413 415 422, or found before sending      (`field`)
        │   ├── LengthExceeded     longer than max_length, or than the whole pool
        │   └── KeyReused          the idempotency key came with another request before
        ├── Denied                 401 403
        ├── NotFound               404
        │   ├── SessionNotFound    unknown, or another tenant's
        │   └── ModelNotFound
        ├── Conflict               409
        │   ├── SessionExists      the chosen id is taken
        │   └── WrongState         a step on an empty session, an import into any other
        ├── SessionGone            410     (`reason`)
        ├── PreconditionFailed     412     (`version`, `valid_length`: the session as it is)
        │   └── ReplyDropped       a retry of what was done before, whose reply was too large to keep
        ├── Refused                408 429 503: not now, and nothing was applied     (`retry_after` seconds)
        │   ├── QueueFull          too many appends wait
        │   ├── QuotaExceeded      the caller has what its quota allows
        │   ├── PoolExhausted      no blocks came free in time
        │   └── Unavailable        loading, draining or down; no memory left for it
        └── ServerError            500 and the rest
            └── ModelFailed        500: the session is as before

The `code` of the problem decides; a code that is not known here leaves it to the status.
"""

from keypast.schemas import Code, ErrorBody, Problem


class KeypastError(Exception):
    """Base of everything above. `str(error)` is fit for a person to read."""


class TransportError(KeypastError):
    """No whole reply came. The call may or may not have been applied: ask the session for its `version`."""


class ConnectFailed(TransportError):
    """Nothing was sent, so nothing was applied."""


class TimedOut(TransportError):
    """The call was sent, and no reply came in time."""


class StreamBroken(TransportError):
    """A stream ended before its end. The session keeps every token that was committed."""


class ProtocolError(KeypastError):
    """The reply is not of this contract."""


class StatusError(KeypastError):
    """The service refused, and said why in a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail or problem.title)
        self.problem = problem
        self.status = problem.status
        self.code = problem.code
        self.detail = problem.detail
        self.request_id = problem.request_id


class InvalidInput(StatusError):
    """A value, shape, dtype or body is wrong; `field` names it when one input is to blame."""

    @property
    def field(self) -> str | None:
        return self.problem.field


class LengthExceeded(InvalidInput):
    """Longer than the session's max_length, or than the whole pool."""


class KeyReused(InvalidInput):
    """An idempotency key stands for one request, and this one came with another before."""


class Denied(StatusError):
    """No key, a bad one, or one that may not do this."""


class NotFound(StatusError):
    """Nothing is there."""


class SessionNotFound(NotFound):
    """Unknown, or another tenant's: the two look the same."""


class ModelNotFound(NotFound):
    """No model of that name is loaded."""


class Conflict(StatusError):
    """The call does not fit what is there; sending it again will not help."""


class SessionExists(Conflict):
    """The chosen session id is taken."""


class WrongState(Conflict):
    """The operation does not apply to the session as it is."""


class SessionGone(StatusError):
    """The session was there; `reason` says how it went."""

    @property
    def reason(self) -> str | None:
        return self.problem.reason


class PreconditionFailed(StatusError):
    """The session has moved on, and nothing was done; its present state rides along."""

    @property
    def version(self) -> int | None:
        return self.problem.version

    @property
    def valid_length(self) -> list[int] | None:
        return self.problem.valid_length


class ReplyDropped(PreconditionFailed):
    """The call was applied when it was sent the first time, and not again; its reply was too large to be kept."""


class Refused(StatusError):
    """Not now, and nothing was applied. `retry_after` is in seconds, None when the service did not say."""

    @property
    def retry_after(self) -> float | None:
        return self.problem.retry_after


class QueueFull(Refused):
    """Too many appends wait."""


class QuotaExceeded(Refused):
    """The caller holds, or does, as much as its quota allows."""


class PoolExhausted(Refused):
    """No blocks came free before the deadline."""


class Unavailable(Refused):
    """The service is loading, draining or down, or its device has too little memory free."""


class ServerError(StatusError):
    """The service failed."""


class ModelFailed(ServerError):
    """The forward pass failed; the session is as before."""


BY_CODE: dict[str, type[StatusError]] = {
    Code.UNAUTHORIZED: Denied,
    Code.FORBIDDEN: Denied,
    Code.NOT_FOUND: NotFound,
    Code.SESSION_NOT_FOUND: SessionNotFound,
    Code.MODEL_NOT_FOUND: ModelNotFound,
    Code.SESSION_EXISTS: SessionExists,
    Code.WRONG_STATE: WrongState,
    Code.SESSION_GONE: SessionGone,
    Code.MOVED: PreconditionFailed,
    Code.REPLY_DROPPED: ReplyDropped,
    Code.MALFORMED: InvalidInput,
    Code.HEAD_TOO_LARGE: InvalidInput,
    Code.BODY_TOO_FINE: InvalidInput,
    Code.TOO_SLOW: Refused,
    Code.METHOD_NOT_ALLOWED: InvalidInput,
    Code.BODY_TOO_LARGE: InvalidInput,
    Code.UNSUPPORTED_MEDIA_TYPE: InvalidInput,
    Code.INVALID_INPUT: InvalidInput,
    Code.LENGTH_EXCEEDED: LengthExceeded,
    Code.KEY_REUSED: KeyReused,
    Code.QUEUE_FULL: QueueFull,
    Code.QUOTA_EXCEEDED: QuotaExceeded,
    Code.POOL_EXHAUSTED: PoolExhausted,
    Code.NOT_READY: Unavailable,
    Code.ENGINE_STOPPED: Unavailable,
    Code.DEVICE_FULL: Unavailable,
    Code.BODIES_FULL: Unavailable,
    Code.MODEL_FAILED: ModelFailed,
    Code.INTERNAL: ServerError,
}

_BY_STATUS: dict[int, type[StatusError]] = {
    401: Denied,
    403: Denied,
    404: NotFound,
    408: Refused,
    409: Conflict,
    410: SessionGone,
    412: PreconditionFailed,
    429: Refused,
    503: Unavailable,
}


def from_problem(problem: Problem) -> StatusError:
    """The leaf of the tree that the problem's code names, else the one of its status."""
    kind = BY_CODE.get(problem.code) or _BY_STATUS.get(problem.status)
    if kind is None:
        kind = InvalidInput if 400 <= problem.status < 500 else ServerError
    return kind(problem)


def invalid_input(field: str, message: str) -> InvalidInput:
    """What the service would answer, found before anything was sent."""
    detail = f"{field}: {message}"
    error = ErrorBody(message=detail, type="invalid_request_error", param=field, code=Code.INVALID_INPUT)
    return InvalidInput(
        Problem(title="Invalid input", status=422, detail=detail, code=Code.INVALID_INPUT, field=field, error=error)
    )
