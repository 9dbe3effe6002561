"""The Open Inference Protocol on the wire: what is read is what was sent, and sizes that lie are refused by name."""

import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keypast.oip import DATATYPES, HEADER, MAX_STRINGS, MAX_TENSORS, header_size, read_infer, strings, write_infer
from keypast.wire import Array, MalformedError, WireError

NUMBERS = ("bool", "uint8", "int32", "int64", "float16", "float32")


def body(tensors: list[dict[str, Any]], tail: bytes = b"", **fields: Any) -> tuple[bytes, int]:
    text = json.dumps({"inputs": tensors, **fields}).encode()
    return text + tail, len(text)


def binary(name: str, datatype: str, shape: list[int], size: object) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


def numbers() -> st.SearchStrategy[Array]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    return st.sampled_from(NUMBERS).flatmap(lambda dtype: hnp.arrays(np.dtype(dtype), shapes))


@given(st.lists(numbers(), min_size=1, max_size=4), st.text(max_size=9))
def test_bytes_come_back_wherever_they_begin(arrays: list[Array], name: str) -> None:
    """The name's length moves the bytes, so that they begin at any address."""
    tensors = [
        binary(f"{name}{at}", DATATYPES[array.dtype.name], list(array.shape), array.nbytes)
        for at, array in enumerate(arrays)
    ]
    request, read = read_infer(*body(tensors, b"".join(array.tobytes() for array in arrays)))
    assert [tensor.name for tensor in request.inputs] == list(read)
    for array, found in zip(arrays, read.values(), strict=True):
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert found.flags.writeable


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=4)))
def test_bfloat16_is_widened_as_torch_does(array: Array) -> None:
    narrow = torch.from_numpy(array).to(torch.bfloat16)
    sent = narrow.view(torch.int16).numpy().tobytes()
    _, read = read_infer(*body([binary("x", "BF16", list(array.shape), len(sent))], sent))
    np.testing.assert_array_equal(read["x"], narrow.float().numpy())


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=5))
def test_strings_come_back(texts: list[bytes]) -> None:
    sent = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    _, read = read_infer(*body([binary("x", "BYTES", [len(texts), 1], len(sent))], sent))
    assert (read["x"].shape, read["x"].ravel().tolist()) == ((len(texts), 1), texts)


@pytest.mark.parametrize("data", [[1.5, -2, 0.5, 4], [[1.5, -2], [0.5, 4]]])
@pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16"])
def test_numbers_in_json(data: list[Any], datatype: str) -> None:
    sent, _ = body([{"name": "x", "datatype": datatype, "shape": [2, 2], "data": data}])
    _, read = read_infer(sent, None)
    assert read["x"].tolist() == [[1.5, -2], [0.5, 4]]
    assert read["x"].dtype == ("float16" if datatype == "FP16" else "float32")


def test_texts_in_json_beside_bytes() -> None:
    texts = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["", "é\0"]}
    request, read = read_infer(*body([texts, binary("n", "INT32", [1], 4)], b"\1\0\0\0", id="r"))
    assert read["text"].tolist() == [b"", "é\0".encode()]
    assert (read["n"].tolist(), request.id) == ([1], "r")


def test_a_header_of_the_whole_body_is_json_alone() -> None:
    sent, size = body([{"name": "x", "datatype": "INT64", "shape": [1], "data": [2**63 - 1]}])
    assert read_infer(sent, size).arrays["x"].tolist() == [2**63 - 1]


FP32 = binary("x", "FP32", [1, 2], 8)
LIES: dict[str, tuple[list[dict[str, Any]], bytes, str]] = {
    "a byte short": ([FP32], bytes(7), "body"),
    "a byte long": ([FP32], bytes(9), "body"),
    "a size off by one": ([binary("x", "FP32", [1, 2], 9)], bytes(9), "x"),
    "a size of -8": ([binary("x", "FP32", [1, 2], -8)], b"", "x"),
    "a size of 2^64": ([binary("x", "FP32", [1, 2], 2**64)], bytes(8), "x"),
    "a size of 2^62": ([binary("x", "FP32", [1, 2], 2**62)], bytes(8), "body"),
    "sizes that even out": ([binary("x", "FP32", [1, 2], 12), binary("y", "FP32", [1, 2], 4)], bytes(16), "x"),
    "a size that is true": ([binary("x", "UINT8", [1], True)], b"\0", "x"),
    "a size that is a text": ([binary("x", "UINT8", [1], "1")], b"\0", "x"),
    "a size that is 8.0": ([binary("x", "FP32", [1, 2], 8.0)], bytes(8), "x"),
    "a product that wraps to 8": ([binary("x", "FP32", [2**31 - 1, 2**31 - 1, 2**31 - 1], 8)], bytes(8), "x"),
    "a zero that hides a product": ([binary("x", "FP32", [0, *[2**31 - 1] * 3], 0)], b"", "x"),
    "a negative axis": ([binary("x", "FP32", [-1, -2], 8)], bytes(8), "inputs[0].shape[0]"),
    "an axis of 2^63": ([binary("x", "FP32", [2**63], 8)], bytes(8), "inputs[0].shape[0]"),
    "nine axes": ([binary("x", "FP32", [1] * 9, 4)], bytes(4), "inputs[0].shape"),
    "a datatype of another kind": ([binary("x", "FP64", [1], 8)], bytes(8), "inputs[0].datatype"),
    "named twice": ([FP32, FP32], bytes(16), "x"),
    "no inputs": ([], b"", "inputs"),
    "too many inputs": ([binary(f"x{at}", "UINT8", [1], 1) for at in range(MAX_TENSORS + 1)], b"", "inputs"),
    "data and bytes": ([FP32 | {"data": [1, 2]}], bytes(8), "x"),
    "neither": ([{"name": "x", "datatype": "FP32", "shape": [1]}], b"", "x"),
    "in shared memory": (
        [{"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"shared_memory_region": "r"}}],
        b"",
        "x",
    ),
    "a bool of 2": ([binary("x", "BOOL", [1], 1)], b"\2", "x"),
    "too few numbers": ([{"name": "x", "datatype": "FP32", "shape": [2], "data": [1]}], b"", "x"),
    "a text where numbers are meant": ([{"name": "x", "datatype": "FP32", "shape": [1], "data": ["1"]}], b"", "x"),
    "a number where texts are meant": ([{"name": "x", "datatype": "BYTES", "shape": [1], "data": [1]}], b"", "x"),
    "a string's length cut off": ([binary("x", "BYTES", [1], 3)], b"\1\0\0", "x"),
    "a string that is too long": ([binary("x", "BYTES", [1], 8)], struct.pack("<I", 2**32 - 1) + b"abcd", "x"),
    "bytes after the strings": ([binary("x", "BYTES", [1], 6)], struct.pack("<I", 1) + b"ab", "x"),
    "too many strings": ([binary("x", "BYTES", [MAX_STRINGS + 1], 0)], b"", "x"),
    "a name of 200 characters": ([binary("x" * 200, "UINT8", [1], 1)], b"\0", "inputs[0].name"),
    "an unknown field": ([FP32 | {"hello": 1}], bytes(8), "inputs[0].hello"),
}


@pytest.mark.parametrize(("tensors", "tail", "field"), LIES.values(), ids=LIES.keys())
def test_what_lies_is_named(tensors: list[dict[str, Any]], tail: bytes, field: str) -> None:
    with pytest.raises(WireError) as refused:
        read_infer(*body(tensors, tail))
    assert refused.value.field == field
    assert isinstance(refused.value, MalformedError) == (field == "body")


def test_a_header_longer_than_the_body_is_malformed() -> None:
    sent, size = body([FP32], bytes(8))
    with pytest.raises(MalformedError, match=f"{HEADER}: is {size + 9}"):
        read_infer(sent, size + 9)
    with pytest.raises(MalformedError):
        read_infer(sent, 0)
    with pytest.raises(MalformedError):
        read_infer(sent, size - 1)


@pytest.mark.parametrize("values", [["-1"], ["1.0"], ["1", "1"], [""], [" 1"], ["١"], ["9" * 19], ["0x10"]])
def test_a_header_that_is_no_number_is_malformed(values: list[str]) -> None:
    with pytest.raises(MalformedError, match=HEADER):
        header_size(values)


def test_header_sizes() -> None:
    assert (header_size([]), header_size(["0"]), header_size(["12"])) == (None, 0, 12)


def test_a_million_names_are_not_parsed() -> None:
    sent = b'{"inputs":[{"name":"x"%s}]}' % b"".join([b',"a":1'] * 300_000)
    with pytest.raises(MalformedError, match="names"):
        read_infer(sent, None)


# ---- replies ---------------------------------------------------------------------------------------------------------


@given(st.lists(numbers(), min_size=1, max_size=4), st.data())
def test_a_reply_comes_back(arrays: list[Array], data: st.DataObject) -> None:
    """Read by the protocol's own rules: JSON, then the bytes of those that say how many they have."""
    outputs = {f"y{at}": array for at, array in enumerate(arrays)}
    asked = data.draw(st.sets(st.sampled_from(sorted(outputs))))
    written = write_infer({"model_name": "m"}, outputs, asked)
    size = len(written.body) if written.header is None else written.header
    told, tail = json.loads(written.body[:size]), written.body[size:]
    assert told["model_name"] == "m"
    for tensor, (name, array) in zip(told["outputs"], outputs.items(), strict=True):
        assert (tensor["name"], tensor["shape"]) == (name, list(array.shape))
        assert tensor["datatype"] == DATATYPES[array.dtype.name]
        finite = array.dtype.kind != "f" or np.isfinite(array).all()
        assert ("data" in tensor) == (name not in asked and finite)
        if "data" in tensor:
            np.testing.assert_array_equal(np.array(tensor["data"], array.dtype).reshape(array.shape), array)
        else:
            length = tensor["parameters"]["binary_data_size"]
            assert tail[:length] == array.tobytes()
            tail = tail[length:]
    assert tail == b""
    assert (written.header is None) == all("data" in tensor for tensor in told["outputs"])


def test_texts_go_out_both_ways() -> None:
    texts = strings(["", "é"])
    assert json.loads(write_infer({}, {"text": texts}, ()).body)["outputs"][0]["data"] == ["", "é"]
    written = write_infer({}, {"text": texts}, {"text"})
    assert written.header is not None
    assert written.body[written.header :] == b"\0\0\0\0\2\0\0\0" + "é".encode()
    assert json.loads(written.body[: written.header])["outputs"][0] == {
        "name": "text",
        "datatype": "BYTES",
        "shape": [2],
        "parameters": {"binary_data_size": 10},
    }
