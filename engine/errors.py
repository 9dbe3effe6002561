"""Everything the engine can refuse, as one tree.

    EngineError
    ├── InvalidInput          a value, shape or dtype is wrong          (`field` names it)
    │   ├── LengthExceeded    longer than max_length, or than the whole pool
    │   └── KeyReused         the key came with another request before
    ├── ModelNotFound         no model of that name is loaded
    ├── SessionNotFound       unknown here, or another tenant's: the two must look the same
    ├── SessionExists         the client-chosen id is taken
    ├── SessionGone           deleted, expired or evicted               (`reason` says which)
    ├── WrongState            a step on an empty session, an import into any other
    ├── Moved                 the version or the length is not what the caller expected
    │   └── ReplyDropped      done before, and not again; its reply was too large to keep
    ├── Refused               not now, try again                        (`retry_after` seconds)
    │   ├── QueueFull         too many appends wait
    │   ├── QuotaExceeded     the tenant's quota of sessions, pins, blocks, positions a minute or appends is used up
    │   └── PoolExhausted     no blocks came free before the wait deadline
    ├── ModelFailed           the forward pass failed; the session is as before
    └── EngineStopped         stopping or stopped; nothing was applied

A transport maps each leaf to its own status; `None` is never an error here, it means "not now". RanksLost and
DeviceLost are outside of the tree: they are nothing that a caller did, and the engine does not go on after them.
"""


class EngineError(Exception):
    """Base of everything the engine raises on purpose. `str(error)` is fit for the caller to read."""


class InvalidInput(EngineError):
    """`field` is the input's name in the caller's words; the message says what would be right."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class LengthExceeded(InvalidInput):
    """The append would pass the session's max_length, or could never fit the pool."""


class KeyReused(InvalidInput):
    """A key stands for one request."""

    def __init__(self) -> None:
        super().__init__("Idempotency-Key", "came with another request on this session; a new request needs a new key")


class ModelNotFound(EngineError):
    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"model {name!r} is not loaded; loaded: {', '.join(known) or 'none'}")
        self.name = name


class SessionNotFound(EngineError):
    def __init__(self) -> None:
        super().__init__("no such session")


class SessionExists(EngineError):
    def __init__(self, session_id: str) -> None:
        super().__init__(f"session id {session_id!r} is taken; choose another or leave it out")


class SessionGone(EngineError):
    """The session was there and is not any more."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the session is gone: {reason}")
        self.reason = reason


class WrongState(EngineError):
    """The operation does not apply to the session as it is."""


class Moved(EngineError):
    """A precondition (version or length) does not hold; the session's present state rides along."""

    def __init__(self, message: str, version: int, valid_length: list[int]) -> None:
        super().__init__(message)
        self.version = version
        self.valid_length = valid_length


class ReplyDropped(Moved):
    """This very request was done before, and made version `made`; its reply was too large to be kept."""

    def __init__(self, made: int, version: int, valid_length: list[int]) -> None:
        message = f"this was done before, at version {made}, and nothing is done now; its reply was too large to keep"
        super().__init__(message, version, valid_length)
        self.made = made


class Refused(EngineError):
    """Not now. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Refused):
    """Too many appends wait, on this session or in the engine."""


class QuotaExceeded(Refused):
    """The tenant has what its quota allows."""


class PoolExhausted(Refused):
    """No blocks came free before the wait deadline."""


class DeviceFull(Refused):
    """The forward pass needed more memory than the device had free; whatever the append had reserved was rolled
    back."""

    def __init__(self) -> None:
        super().__init__("the device has too little memory free for this; the session is unchanged, try again later")


class ModelFailed(EngineError):
    """The forward pass raised; whatever the append had reserved was rolled back."""


class EngineStopped(EngineError):
    """The engine is stopping or has stopped; nothing was applied."""


class DeviceLost(BaseException):
    """The device answers nothing any more: a kernel has ruined the process's context on it. No Exception either."""


class RanksLost(BaseException):
    """A process that holds a share of the models is gone. Not an Exception: nothing takes it for a model's failure."""
