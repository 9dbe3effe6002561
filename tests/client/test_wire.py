"""Tensors to bytes and back: every form returns what it was given, and every malformed one is refused by name."""

import base64
import hashlib
import json
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from safetensors.numpy import load

from keypast import wire
from keypast.schemas import AppendReply, AppendRequest, Outputs, PrefillRequest, TensorBody, Timings, TopLogprob
from keypast.wire import Array, Form, WireError

FORMS: tuple[Form, ...] = ("flat", "nested", "base64", "safetensors")
DTYPES = ("float16", "float32", "int32", "int64", "uint8", "bool")
forms = st.sampled_from(FORMS)


def arrays(*, finite: bool = True) -> st.SearchStrategy[Array]:
    def of(dtype: str) -> st.SearchStrategy[Array]:
        floats = {"allow_nan": not finite, "allow_infinity": not finite} if dtype.startswith("float") else {}
        shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
        return hnp.arrays(np.dtype(dtype), shapes, elements=floats or None)

    return st.sampled_from(DTYPES).flatmap(of)


def same(left: Array, right: Array) -> bool:
    return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


# ---- round trips ----


@given(arrays(), forms)
def test_a_request_comes_back(array: Array, form: Form) -> None:
    request = PrefillRequest(batch_valid_length=[3], need_weights=True)
    sent = wire.write_append(request, {"query": array, "key": array}, form)
    read = wire.read_append(PrefillRequest, sent.content_type, sent.body, list(sent.query.items()))
    assert same(read.arrays["query"], array)
    assert same(read.arrays["key"], array)
    assert read.arrays["query"].flags.writeable
    assert (read.request.batch_valid_length, read.request.need_weights) == ([3], True)
    if array.size and array.ndim > 1:  # a nested list of one axis is a flat one
        assert read.form == form


@given(arrays(finite=False), forms)
def test_a_reply_comes_back(array: Array, form: Form) -> None:
    top = [[TopLogprob(token_id=1, logprob=-0.5, text="é\n")]]
    reply = AppendReply(
        outputs=Outputs(next_token=[7, None], text=["a\u2028", ""], top_logprobs=top),
        past_length=[0, 2],
        valid_length=[3, 2],
        version=4,
        computed=[3, 2],
        reused=[2, 0],
        shared=[1, 0],
        timings=Timings(queue_ms=0.25, compute_ms=2),
    )
    told = reply.model_dump(exclude_none=True)
    sent = wire.write_reply(told, told.pop("outputs"), {"logits": array}, form)
    read, outputs = wire.read_reply(sent.content_type, sent.body)
    assert read.model_copy(update={"outputs": read.outputs.model_copy(update={"logits": None})}) == reply
    if array.dtype.kind == "f" and np.isnan(array).any():  # NaNs come back as NaNs
        np.testing.assert_array_equal(outputs["logits"], array)
    else:
        assert same(outputs["logits"], array)
    assert sent.headers["ETag"] == '"4"'
    assert sent.headers["Keypast-Valid-Length"] == "3,2"
    efforts = [sent.headers[f"Keypast-{name}"] for name in ("Computed", "Reused", "Shared")]
    assert efforts == ["3,2", "2,0", "1,0"]


@given(arrays(), st.sampled_from(["flat", "nested", "base64"]))
def test_any_layout_and_byte_order(array: Array, form: Form) -> None:
    turned = array.astype(array.dtype.newbyteorder(">"), order="F").T
    body = TensorBody.model_validate_json(json.dumps(wire.encode_tensor(turned, form)))
    assert same(wire.decode_tensor("x", body), np.ascontiguousarray(array.T).reshape(array.T.shape))
    assert same(wire.load_tensors(wire.dump_tensors({"x": turned}, {})).arrays["x"], array.T.copy(order="C"))


@given(st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7F80 != 0x7F80))
def test_bfloat16_is_widened_exactly(bits: int) -> None:
    wanted = np.frombuffer(struct.pack("<I", bits << 16), dtype="<f4")
    half = struct.pack("<H", bits)
    encoded = base64.b64encode(half).decode()
    assert same(wire.decode_tensor("x", TensorBody(dtype="bfloat16", shape=[1], data_b64=encoded)), wanted)
    number = TensorBody(dtype="bfloat16", shape=[1], data=[float(wanted[0])])
    assert same(wire.decode_tensor("x", number), wanted)
    assert same(wire.load_tensors(file({"x": ("BF16", [1], half)})).arrays["x"], wanted)


@pytest.mark.parametrize(
    ("number", "rounded"), [(1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-20, 1 + 2**-7)]
)
def test_bfloat16_rounds_to_nearest_even(number: float, rounded: float) -> None:
    assert wire.decode_tensor("x", TensorBody(dtype="bfloat16", shape=[1], data=[number])) == rounded


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = scalars | st.lists(scalars, max_size=3) | st.sampled_from(["null", "NaN", "[", "7", '"7"', " 7"])


@given(st.dictionaries(st.text(max_size=5), values, max_size=3))
def test_options_come_back(options: dict[str, Any]) -> None:
    assert wire.decode_options(wire.encode_options(options).items()) == options


def test_options_are_readable() -> None:
    encoded = wire.encode_options({"logits": "last", "need_weights": True, "text": "7", "sample": {"top_k": 1}})
    assert encoded == {"logits": "last", "need_weights": "true", "text": '"7"', "sample": '{"top_k":1}'}


def test_ids_may_come_as_tensors() -> None:
    body = wire.dump_tensors({"token_ids": np.array([[1, 2]]), "batch_valid_length": np.array([2], np.int32)}, {})
    read = wire.read_append(PrefillRequest, wire.SAFETENSORS_TYPE, body, [("logits", "last")])
    assert (read.request.token_ids, read.request.batch_valid_length) == ([[1, 2]], [2])
    assert (read.request.logits, read.arrays, read.form) == ("last", {}, "safetensors")


def test_text_travels_as_json_in_any_form() -> None:
    sent = wire.write_append(PrefillRequest(text="a"), {}, "safetensors")
    assert (sent.body, sent.content_type, sent.query) == (b'{"text":"a"}', wire.JSON_TYPE, {})


@pytest.mark.parametrize(
    ("form", "accept", "wanted"),
    [
        ("flat", None, "flat"),
        ("nested", "*/*", "nested"),
        ("base64", "application/json", "base64"),
        ("nested", "application/vnd.safetensors", "safetensors"),
        ("flat", "Application/VND.safetensors; q=0.9, application/json", "safetensors"),
        ("safetensors", "*/*", "safetensors"),
        ("safetensors", None, "safetensors"),
        ("safetensors", "application/json", "base64"),
    ],
)
def test_the_reply_takes_the_request_s_form(form: Form, accept: str | None, wanted: Form) -> None:
    assert wire.reply_form(form, accept) == wanted


def test_if_match() -> None:
    assert wire.parse_if_match(None) is None
    assert wire.parse_if_match(" * ") is None
    assert wire.parse_if_match(wire.etag(12)) == 12
    for wrong in ("12", 'W/"1"', '"1", "2"', '""', '"-1"', '"٣"', '"' + "9" * 19 + '"'):
        with pytest.raises(WireError, match="If-Match"):
            wire.parse_if_match(wrong)


# ---- what is refused ----


def tensor(**changes: object) -> dict[str, object]:
    return {"dtype": "float32", "shape": [1, 2], "data": [1, 2], **changes}


def b64(data: bytes) -> dict[str, object]:
    return {"data": None, "data_b64": base64.b64encode(data).decode()}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (tensor(data=[1]), "1 numbers where shape [1, 2] needs 2"),
        (tensor(data=[1, 2, 3]), "3 numbers"),
        (tensor(data=[]), "0 numbers"),
        (tensor(data=[[1], [2]]), "does not have 1 entries everywhere on axis 0"),
        (tensor(data=[[1, 2, 3]]), "does not have 2 entries everywhere on axis 1"),
        (tensor(shape=[2, 2], data=[[1, 2], [3]]), "does not have 2 entries everywhere on axis 1"),
        (tensor(shape=[2, 2], data=[[1, 2], 3]), "does not have 2 entries everywhere on axis 1"),
        (tensor(data=[[[1], [2]]]), "data holds list"),
        (tensor(data=[1, [2]]), "data holds list"),
        (tensor(data=[1, "2"]), "data holds str where float32 is meant"),
        (tensor(data=[1, None]), "data holds NoneType"),
        (tensor(data=[1, True]), "data holds bool"),
        (tensor(dtype="int32", data=[1, 2.0]), "data holds float where int32 is meant"),
        (tensor(dtype="int32", data=[1, 2**31]), "does not fit int32"),
        (tensor(dtype="int64", data=[1, 2**63]), "does not fit int64"),
        (tensor(dtype="uint8", data=[1, -1]), "does not fit uint8"),
        (tensor(dtype="uint8", data=[1, 256]), "does not fit uint8"),
        (tensor(dtype="bool", data=[1, 2]), "true, false, 0 or 1"),
        (tensor(dtype="bool", data=[1, 300]), "does not fit bool"),
        (tensor(dtype="float16", data=[1, 70000]), "does not fit float16"),
        (tensor(dtype="bfloat16", data=[1, 3.4e38]), "does not fit bfloat16"),
        (tensor(data=[1, 1e39]), "does not fit float32"),
        (tensor(data=[1, 10**400]), "does not fit float32"),
        (tensor(data=[1, float("nan")]), "must be finite"),
        (tensor(data=[1, float("-inf")]), "must be finite"),
        (tensor(**b64(struct.pack("<2f", 1, np.inf))), "must be finite"),
        (tensor(**b64(b"1234567")), "7 bytes where the shape needs 8"),
        (tensor(**b64(b"123")), "4 characters, but 8 bytes need 12"),
        (tensor(data=None, data_b64="!" * 12), "not base64"),
        (tensor(data=None, data_b64="é" * 12), "not base64"),
        (tensor(data=None, data_b64="QUFBQUFBQUFB"), "9 bytes where the shape needs 8"),
        (tensor(dtype="bool", **b64(b"\0\2")), "one byte, 0 or 1"),
        (tensor(shape=[0, 2**31 - 1, 2**31 - 1, 2**31 - 1], data=[]), "is too large"),
        (tensor(shape=[2**31 - 1, 2**31 - 1], data=[1]), "is too large"),
        (tensor(shape=[2**31 - 1], data_b64="", data=None), "0 characters"),
    ],
)
def test_a_malformed_tensor(body: dict[str, object], message: str) -> None:
    request = json.dumps({"query": body}).encode()
    with pytest.raises(WireError) as caught:
        wire.read_append(PrefillRequest, None, request, [])
    assert caught.value.field == "query"
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (tensor(dtype="float64"), "query.dtype"),
        (tensor(shape=[-1]), "query.shape[0]"),
        (tensor(shape=[2**63]), "query.shape[0]"),
        (tensor(shape=[True]), "query.shape[0]"),
        (tensor(shape=[1.0]), "query.shape[0]"),
        (tensor(shape=[1] * 9), "query.shape"),
        (tensor(shape=None), "query.shape"),
        (tensor(data=7), "query.data"),
        (tensor(data=None), "query"),
        (tensor(data_b64=""), "query"),
        (tensor(more=1), "query.more"),
        ([], "query"),
    ],
)
def test_a_malformed_envelope(body: object, field: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.read_append(PrefillRequest, None, json.dumps({"query": body}).encode(), [])
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"text": 1}', "text"),
        (b'{"text": ""}', "text"),
        (b'{"text": ["a", ""]}', "text"),
        (b'{"token_ids": [[1], [1, 2]]}', "token_ids"),
        (b'{"token_ids": [[1], []]}', "token_ids[1]"),
        (b'{"token_ids": [[1, true]]}', "token_ids[0][1]"),
        (b'{"token_ids": [[1, -1]]}', "token_ids[0][1]"),
        (b'{"token_ids": [[9223372036854775808]]}', "token_ids[0][0]"),
        (b'{"token_ids": [[1]], "text": "a"}', "body"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "user"}]}', "messages[0].content"),
        (b'{"batch_valid_length": ["5"]}', "batch_valid_length[0]"),
        (b'{"sample": {"temperature": "1"}}', "sample.temperature"),
        (b'{"sample": {"top_p": 0}}', "sample.top_p"),
        (b'{"sample": {"temperature": NaN}}', "sample.temperature"),
        (b'{"logits": "some"}', "logits"),
        (b'{"top_logprobs": 1.5}', "top_logprobs"),
        (b'{"nonsense": 1}', "nonsense"),
        (b"[]", "body"),
    ],
)
def test_a_wrong_option(body: bytes, field: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.read_append(PrefillRequest, "application/json; charset=utf-8", body, [])
    assert caught.value.field == field
    assert type(caught.value) is WireError


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"text": "\\ud800"}'])
def test_what_is_not_json(body: bytes) -> None:
    with pytest.raises(wire.MalformedError) as caught:
        wire.read_append(PrefillRequest, None, body, [])
    assert caught.value.field == "body"


def test_other_media_and_misplaced_options() -> None:
    with pytest.raises(wire.UnsupportedMediaError, match="text/plain"):
        wire.read_append(PrefillRequest, "text/plain", b"", [])
    with pytest.raises(WireError, match="logits"):
        wire.read_append(PrefillRequest, None, b"{}", [("logits", "last")])


# ---- safetensors files ----


@given(st.dictionaries(st.text(min_size=1, max_size=4), arrays(), max_size=4))
def test_a_file_is_the_library_s_and_the_same_every_time(tensors: dict[str, Array]) -> None:
    about = {"b": "ü", "a": "1", "c": ""}
    body = wire.dump_tensors(tensors, about)
    read = load(body)
    assert set(read) == set(tensors)
    assert all(same(read[name], array) for name, array in tensors.items())
    assert wire.load_tensors(body).metadata == about
    assert wire.dump_tensors(dict(reversed(tensors.items())), about) == body
    header = json.loads(body[8 : 8 + struct.unpack_from("<Q", body)[0]])
    starts = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    assert all(starts[name] % array.itemsize == 0 for name, array in tensors.items())


def test_a_digest_is_of_names_dtypes_shapes_and_bytes() -> None:
    tensors = {"b": np.array([[1, 2]], ">f2"), "a.10": np.zeros((2, 0), np.int64), "a.2": np.array(7, np.int32)}
    text = b"a.10 int64 2,0\n" + b"a.2 int32 \n\7\0\0\0" + b"b float16 1,2\n\x00\x3c\x00\x40"
    assert wire.digest(tensors) == "sha256:" + hashlib.sha256(text).hexdigest()
    for other in (
        {**tensors, "b": tensors["b"].T},
        {**tensors, "b": tensors["b"].astype(np.float32)},
        {**tensors, "b": tensors["b"] + 1},
        {**tensors, "c": tensors["b"]},
        {"a.10": tensors["a.10"], "a.2": tensors["a.2"], "c": tensors["b"]},
    ):
        assert wire.digest(other) != wire.digest(tensors)
    with pytest.raises(WireError, match="x: dtype float64"):
        wire.digest({"x": np.zeros(1)})


@pytest.mark.parametrize("content_type", [None, "", "application/json", "text/plain"])
def test_a_body_that_can_only_be_safetensors(content_type: str | None) -> None:
    wire.check_safetensors("Application/Vnd.Safetensors; x=1")
    with pytest.raises(wire.UnsupportedMediaError, match=r"send application/vnd\.safetensors"):
        wire.check_safetensors(content_type)


def file(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, each) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(each)]}
        data += each
    return headed(json.dumps(header).encode(), data)


def headed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


ENTRY = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"1234567",
        headed(b""),
        headed(b"{}", length=3),
        headed(b"{}", length=2**63),
        headed(b"{}", length=2**64 - 1),
        headed(b"{}", length=1),
        headed(b"{" + b" " * wire.MAX_HEADER_BYTES + b"}"),
        headed(b"[]"),
        headed(b"7 "),
        headed(b"\xff\xff"),
        headed(b"{" + b" " * 10),
        headed(b"[" * 100_000),
        headed(b'{"\\ud800":1}'),
        headed(b'{"a":1}'),
        headed(b'{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}', b"x"),
        headed(b'{"__metadata__":{"a":1}}'),
        headed(b'{"__metadata__":[]}'),
        headed(b"{" + ENTRY + b"}"),
        headed(b"{" + ENTRY + b"}", b"xy"),
        headed(b"{" + ENTRY.replace(b"[0,1]", b"[1,2]") + b"}", b"xy"),
        headed(b"{" + ENTRY.replace(b"[0,1]", b"[1,0]") + b"}", b"x"),
        headed(b"{" + ENTRY.replace(b"[1]", b"[-1]") + b"}", b"x"),
        headed(b"{" + ENTRY.replace(b"[1]", b"[2]") + b"}", b"x"),
        headed(b"{" + ENTRY.replace(b"[1]", b"[4611686018427387904,8]") + b"}", b"x"),
        headed(b"{" + ENTRY + b"," + ENTRY.replace(b'"a"', b'"b"') + b"}", b"x"),
    ],
)
def test_what_is_not_a_safetensors_file(body: bytes) -> None:
    with pytest.raises(wire.MalformedError) as caught:
        wire.load_tensors(body)
    assert caught.value.field == "body"


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (headed(b"{" + ENTRY + b"," + ENTRY + b"}", b"x"), "body", "'a' is named twice"),
        (headed(b'{"\\ud800":1,"\\ud800":2}'), "body", "'\\ud800' is named twice"),
        (file({"a": ("F64", [1], bytes(8))}), "a", "F64 is not one of"),
        (file({"a": ("I8", [1], b"x")}), "a", "I8 is not one of"),
        (file({"a": ("BOOL", [2], b"\1\2")}), "a", "one byte, 0 or 1"),
        (file({"a": ("F32", [1], struct.pack("<f", np.nan))}), "a", "must be finite"),
        (file({"a": ("BF16", [1], b"\x80\x7f")}), "a", "must be finite"),
        (file({"a": ("F32", [0, 2**31, 2**31, 2**31], b"")}), "a", "too large"),
    ],
)
def test_a_wrong_tensor_in_a_file(body: bytes, field: str, message: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.load_tensors(body)
    assert caught.value.field == field
    assert message in caught.value.message


def test_a_null_metadata_and_an_empty_file() -> None:
    assert wire.load_tensors(headed(b'{"__metadata__":null}')) == ({}, {})
    assert wire.load_tensors(headed(b"{}")) == ({}, {})


@pytest.mark.parametrize(
    ("names", "query", "field"),
    [
        (["query", "nonsense"], [], "nonsense"),
        (["query"], [("key", "1")], "key"),
        (["batch_valid_length"], [("batch_valid_length", "[1]")], "batch_valid_length"),
        (["query"], [("logits", "last"), ("logits", "all")], "logits"),
        (["query"], [("nonsense", "1")], "nonsense"),
        (["query"], [("need_weights", "True")], "need_weights"),
        (["query"], [("sample", "{")], "sample"),
        (["query"], [("top_logprobs", "9" * 5000)], "top_logprobs"),
        (["query"], [("batch_valid_length", "[" * 100_000)], "batch_valid_length"),
        (["token_ids"], [], "token_ids[0]"),
    ],
)
def test_a_wrong_name_in_a_file_or_its_query(names: list[str], query: list[tuple[str, str]], field: str) -> None:
    body = wire.dump_tensors({name: np.ones(1, np.float32) for name in names}, {})
    with pytest.raises(WireError) as caught:
        wire.read_append(AppendRequest, wire.SAFETENSORS_TYPE, body, query)
    assert caught.value.field == field


@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_malformed(data: bytes) -> None:
    for body in (data, headed(data), headed(b"{" + ENTRY + b"}", data)):
        with suppress(WireError):
            wire.load_tensors(body)


def test_an_array_that_cannot_travel() -> None:
    with pytest.raises(WireError, match="float64"):
        wire.encode_tensor(np.zeros(1), "flat")
    with pytest.raises(WireError, match="x: dtype complex64"):
        wire.dump_tensors({"x": np.zeros(1, np.complex64)}, {})


@given(st.integers(max_value=-1) | st.integers(min_value=2**31))
def test_no_integer_passes_its_bounds(number: int) -> None:
    with pytest.raises(ValidationError):
        AppendRequest(batch_valid_length=[number])
