"""keypast: KV-cache sessions over HTTP. This package is the light client; `keypast[server]` brings the service."""

from importlib.metadata import version

from keypast._protocol import AppendResult, Retries
from keypast._stream import Token
from keypast.aio import AsyncClient, AsyncEventFeed, AsyncSession, AsyncTokenStream
from keypast.client import Client, EventFeed, Session, TokenStream
from keypast.errors import (
    Conflict,
    ConnectFailed,
    Denied,
    InvalidInput,
    KeypastError,
    LengthExceeded,
    ModelFailed,
    ModelNotFound,
    NotFound,
    PoolExhausted,
    PreconditionFailed,
    ProtocolError,
    QueueFull,
    QuotaExceeded,
    Refused,
    ServerError,
    SessionExists,
    SessionGone,
    SessionNotFound,
    StatusError,
    StreamBroken,
    TimedOut,
    TransportError,
    Unavailable,
    WrongState,
)
from keypast.past import Past
from keypast.schemas import Event

__version__ = version("keypast")

__all__ = [
    "AppendResult",
    "AsyncClient",
    "AsyncEventFeed",
    "AsyncSession",
    "AsyncTokenStream",
    "Client",
    "Conflict",
    "ConnectFailed",
    "Denied",
    "Event",
    "EventFeed",
    "InvalidInput",
    "KeypastError",
    "LengthExceeded",
    "ModelFailed",
    "ModelNotFound",
    "NotFound",
    "Past",
    "PoolExhausted",
    "PreconditionFailed",
    "ProtocolError",
    "QueueFull",
    "QuotaExceeded",
    "Refused",
    "Retries",
    "ServerError",
    "Session",
    "SessionExists",
    "SessionGone",
    "SessionNotFound",
    "StatusError",
    "StreamBroken",
    "TimedOut",
    "Token",
    "TokenStream",
    "TransportError",
    "Unavailable",
    "WrongState",
]
