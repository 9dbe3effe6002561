"""Calls as built and replies as parsed, without a client."""

import json

import numpy as np
import pytest

from keypast import _protocol, errors, schemas, wire
from keypast._protocol import Response, as_array, request_of
from keypast._session import create_session, list_sessions


def test_an_attention_prefill_is_a_safetensors_file() -> None:
    query = np.ones((1, 2, 4), np.float16)
    inputs = {
        "query": query,
        "attention_mask": np.ones((1, 2, 2), bool),
        "batch_valid_length": [2],
        "need_weights": True,
    }
    call = _protocol.append("a b", "prefill", inputs, binary=True, if_match=3)
    assert (call.method, call.path) == ("POST", "/v1/sessions/a%20b/prefill")
    assert call.query == {"batch_valid_length": "[2]", "need_weights": "true"}
    assert call.headers == {
        "Content-Type": wire.SAFETENSORS_TYPE,
        "Accept": wire.SAFETENSORS_TYPE,
        "If-Match": '"3"',
    }
    assert set(wire.load_tensors(call.body).arrays) == {"query", "attention_mask"}


def test_without_binary_it_is_base64() -> None:
    call = _protocol.append("s", "step", {"query": np.ones((1, 1, 2), np.float32)}, binary=False)
    assert call.headers == {"Content-Type": wire.JSON_TYPE, "Accept": wire.JSON_TYPE}
    assert json.loads(call.body)["query"]["data_b64"] == "AACAPwAAgD8="


def test_only_what_was_given_travels() -> None:
    call = _protocol.append("s", "prefill", {"text": "a", "sample": {"temperature": 0}}, binary=True)
    assert json.loads(call.body) == {"text": "a", "sample": {"temperature": 0.0}}
    assert call.headers["Accept"] == wire.JSON_TYPE
    assert json.loads(create_session("m", {"labels": {"a": "b"}}).body) == {"model": "m", "labels": {"a": "b"}}
    assert list_sessions({"label": ["a"]}, None).query == {"label": ["a"]}


def test_a_stream_asks_for_events() -> None:
    request = request_of(schemas.GenerateRequest, {"stream": True, "stop": ["a"]})
    call = _protocol.stream("s", request)
    assert call.headers["Accept"] == "text/event-stream"
    assert json.loads(call.body) == {"stream": True, "stop": ["a"]}


class FakeTensor:
    """Does what a torch tensor does."""

    def __init__(self, array: wire.Array, dtype: str) -> None:
        self.array = array
        self.dtype = dtype
        self.steps: list[str] = []

    def detach(self) -> "FakeTensor":
        self.steps.append("detach")
        return self

    def cpu(self) -> "FakeTensor":
        self.steps.append("cpu")
        return self

    def float(self) -> "FakeTensor":
        return FakeTensor(self.array.astype(np.float32), "torch.float32")

    def numpy(self) -> wire.Array:
        if self.dtype == "torch.bfloat16":
            raise TypeError("numpy has no bfloat16")
        return self.array


def test_a_torch_tensor_by_what_it_does() -> None:
    half = FakeTensor(np.ones(2, np.float16), "torch.float16")
    assert as_array("query", half).dtype == np.float16
    assert half.steps == ["detach", "cpu"]
    assert as_array("query", FakeTensor(np.ones(2, np.float16), "torch.bfloat16")).dtype == np.float32


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([[1.5, 2]], "float32"),
        ([[1, 0]], "int64"),
        ([[True, False]], "bool"),
        (np.ones(2, np.float64), "float32"),
        (np.ones(2, np.int8), "int32"),
        (np.ones(2, np.uint16), "int32"),
        (np.ones(2, np.uint8), "uint8"),
    ],
)
def test_dtypes_that_travel(value: object, dtype: str) -> None:
    assert as_array("x", value).dtype == dtype


@pytest.mark.parametrize("value", [[[1.0], [1.0, 2.0]], ["a"], [None], np.ones(1, np.uint64), np.ones(1, np.complex64)])
def test_dtypes_that_do_not(value: object) -> None:
    with pytest.raises(errors.InvalidInput) as caught:
        as_array("query", value)
    assert caught.value.field == "query"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"object": "list", "data": [{"id": 1}]}'])
def test_a_reply_of_another_service(body: bytes) -> None:
    response = Response(200, {"content-type": "application/json"}, body)
    with pytest.raises(errors.ProtocolError):
        _protocol.parse_model(schemas.ModelList)(response)
    with pytest.raises(errors.ProtocolError):
        _protocol.parse_append(response)


def test_an_append_answered_with_a_page() -> None:
    with pytest.raises(errors.ProtocolError, match="text/html"):
        _protocol.parse_append(Response(200, {"content-type": "text/html"}, b"<html>"))


def test_a_newer_service_may_say_more() -> None:
    response = Response(200, {}, b'{"version": "9.9", "news": 1}')
    assert _protocol.parse_model(schemas.Version)(response).version == "9.9"
