"""The tree: every code has its leaf, and what has no code goes by its status."""

import re

import httpx
import pytest

from keypast import errors
from keypast._protocol import Response, Retries, check, status_error, transport_error
from keypast.schemas import Code

from .fake import STATUS, problem

LEAVES = {
    Code.SESSION_NOT_FOUND: errors.SessionNotFound,
    Code.MODEL_NOT_FOUND: errors.ModelNotFound,
    Code.SESSION_GONE: errors.SessionGone,
    Code.WRONG_STATE: errors.WrongState,
    Code.MOVED: errors.PreconditionFailed,
    Code.REPLY_DROPPED: errors.ReplyDropped,
    Code.LENGTH_EXCEEDED: errors.LengthExceeded,
    Code.KEY_REUSED: errors.KeyReused,
    Code.INVALID_INPUT: errors.InvalidInput,
    Code.UNSUPPORTED_MEDIA_TYPE: errors.InvalidInput,
    Code.QUEUE_FULL: errors.QueueFull,
    Code.QUOTA_EXCEEDED: errors.QuotaExceeded,
    Code.POOL_EXHAUSTED: errors.PoolExhausted,
    Code.NOT_READY: errors.Unavailable,
    Code.ENGINE_STOPPED: errors.Unavailable,
    Code.DEVICE_FULL: errors.Unavailable,
    Code.BODIES_FULL: errors.Unavailable,
    Code.MODEL_FAILED: errors.ModelFailed,
}


def of(response: httpx.Response) -> errors.StatusError:
    return status_error(Response(response.status_code, response.headers, response.content))


def test_every_code_has_a_leaf() -> None:
    assert set(errors.BY_CODE) == set(Code)


@pytest.mark.parametrize("code", LEAVES)
def test_the_code_decides(code: Code) -> None:
    error = of(problem(code, "because", request_id="r-1"))
    assert type(error) is LEAVES[code]
    assert (str(error), error.detail, error.status, error.code) == ("because", "because", STATUS[code], code)
    assert error.request_id == "r-1"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.InvalidInput),
        (401, errors.Denied),
        (403, errors.Denied),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (410, errors.SessionGone),
        (412, errors.PreconditionFailed),
        (413, errors.InvalidInput),
        (418, errors.InvalidInput),
        (429, errors.Refused),
        (500, errors.ServerError),
        (502, errors.ServerError),
        (503, errors.Unavailable),
        (599, errors.ServerError),
    ],
)
def test_without_a_problem_the_status_decides(status: int, kind: type[errors.StatusError]) -> None:
    error = of(httpx.Response(status, content=b"<html>bad gateway</html>"))
    assert type(error) is kind
    assert str(error).startswith(str(status))


def test_members() -> None:
    moved = of(problem(Code.MOVED, version=3, valid_length=[7]))
    assert isinstance(moved, errors.PreconditionFailed)
    assert (moved.version, moved.valid_length) == (3, [7])
    wrong = of(problem(Code.INVALID_INPUT, field="query"))
    assert isinstance(wrong, errors.InvalidInput)
    assert wrong.field == "query"
    refused = of(problem(Code.QUEUE_FULL, retry_header=2, retry_after=1.5))
    assert isinstance(refused, errors.Refused)
    assert refused.retry_after == 1.5  # the header can only say whole seconds


@pytest.mark.parametrize(("header", "seconds"), [("3", 3.0), ("soon", None), ("Wed, 21 Oct 2026 07:28:00 GMT", None)])
def test_retry_after(header: str, seconds: float | None) -> None:
    refused = of(httpx.Response(503, headers={"Retry-After": header}))
    assert isinstance(refused, errors.Refused)
    assert refused.retry_after == seconds
    assert Retries().wait(0, refused) == seconds


def test_a_success_and_a_redirect() -> None:
    check(Response(204, {}, b""))
    with pytest.raises(errors.ProtocolError, match="307"):
        check(Response(307, {}, b""))


def test_transport() -> None:
    assert type(transport_error(httpx.ConnectTimeout(""))) is errors.ConnectFailed
    assert type(transport_error(httpx.PoolTimeout(""))) is errors.ConnectFailed
    assert type(transport_error(httpx.WriteTimeout(""))) is errors.TimedOut
    assert str(transport_error(httpx.DecodingError(""))).endswith("DecodingError")


def test_the_tree_is_as_drawn() -> None:
    drawn = re.findall(r"^([ │├└─]*)([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE)
    path: list[type] = []
    found = set()
    for branch, name in drawn:
        depth = (len(branch) - 4) // 4
        kind = getattr(errors, name, None)
        if kind is None:
            continue  # a word of the text
        if depth:
            assert kind.__bases__ == (path[depth - 1],), name
        path = [*path[:depth], kind]
        found.add(kind)
    assert found == {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
