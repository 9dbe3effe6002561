"""The Open Inference Protocol v2 on the wire, with Triton's binary tensor data: JSON, then bytes in the tensors' order.

    |<-- Inference-Header-Content-Length -->|<- binary_data_size ->|<- binary_data_size ->|
    {"inputs": [{"name": "query", ..}, ..]}  query's bytes          key's bytes

Without that header the whole body is JSON, and every tensor has its `data` in it. Bytes are little-endian, row-major; a
BYTES tensor is its strings one after the other, each after its length in four bytes. All sizes are compared with what
is there before anything is allocated for them. Whether numbers are finite is the engine's to check.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, StringConstraints
from pydantic_core import to_json

from keypast.schemas import MAX_ROWS, Count, Reply, Request, TensorBody
from keypast.wire import (
    Array,
    MalformedError,
    WireError,
    byte_size,
    decode_tensor,
    flatten,
    from_bytes,
    plain_array,
    raw_bytes,
    validated,
)

HEADER = "Inference-Header-Content-Length"
SIZE = "binary_data_size"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters", "sequence", "sequence(string_id)")
MAX_TENSORS = 64
MAX_PARAMETERS = 64
MAX_STRINGS = MAX_ROWS  # of one BYTES tensor: a text a row

Datatype = Literal["BOOL", "UINT8", "INT32", "INT64", "FP16", "BF16", "FP32", "BYTES"]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Parameter = bool | int | float | str
Parameters = Annotated[dict[Name, Parameter], Field(max_length=MAX_PARAMETERS)]

DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float32",
}
DATATYPES: Mapping[str, Datatype] = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "object": "BYTES",
}


# ---- bodies ---------------------------------------------------------------------------------------------------------


class InferInput(Request):
    """`data`, flat or nested, or `parameters.binary_data_size` of the bytes after the JSON."""

    name: Name
    datatype: Datatype
    shape: list[Count] = Field(max_length=8)
    parameters: Parameters = Field(default_factory=dict)
    data: list[Any] | None = None


class InferOutput(Request):
    """`parameters.binary_data`: as bytes after the JSON; default: `binary_data_output` of the request."""

    name: Name
    parameters: Parameters = Field(default_factory=dict)


class InferRequest(Request):
    id: Annotated[str, StringConstraints(max_length=256)] | None = None
    parameters: Parameters = Field(default_factory=dict)
    inputs: list[InferInput] = Field(min_length=1, max_length=MAX_TENSORS, fail_fast=True)
    outputs: list[InferOutput] | None = Field(
        default=None, max_length=MAX_TENSORS, fail_fast=True, description="default: those of the model's metadata"
    )


class InferredTensor(Reply):
    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, Parameter] | None = None
    data: list[Any] | None = Field(default=None, description="flat, row-major")


class InferReply(Reply):
    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Parameter] | None = None
    outputs: list[InferredTensor]


class ServerMetadata(Reply):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(Reply):
    """-1 in `shape` is any number."""

    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(Reply):
    """`outputs` are those that a request gets which names none."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfigTensor(Reply):
    name: str
    data_type: str
    dims: list[int]
    optional: bool | None = None


class SequenceBatching(Reply):
    max_sequence_idle_microseconds: int


class ConfigText(Reply):
    string_value: str


class ModelConfig(Reply):
    """Triton's model configuration, as far as its clients read it. `max_batch_size` 0: the rows are in the dims."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfigTensor]
    output: list[ConfigTensor]
    sequence_batching: SequenceBatching
    parameters: dict[str, ConfigText] = Field(
        description="`further_outputs`: those that are given when they are named, separated by commas"
    )


class Refusal(Reply):
    error: str


# ---- a request ------------------------------------------------------------------------------------------------------


class Inference(NamedTuple):
    """A request as read: its tensors are in `arrays`, by name; BYTES as an array of `bytes` objects."""

    request: InferRequest
    arrays: dict[str, Array]


def header_size(values: Sequence[str]) -> int | None:
    """What the request's headers of that name say, None when it has none. Raises MalformedError."""
    if not values:
        return None
    if len(values) > 1 or not re.fullmatch(r"\d{1,18}", values[0], re.ASCII):
        raise MalformedError(HEADER, "must be one number: the bytes of JSON that the body begins with")
    return int(values[0])


def read_infer(body: bytes, header: int | None) -> Inference:
    """`header`: bytes of JSON, None when all is. Raises WireError naming the input, MalformedError."""
    if header is not None and header > len(body):
        raise MalformedError(HEADER, f"is {header}, and the body has {len(body)} bytes")
    size = len(body) if header is None else header
    request = validated(InferRequest, body[:size])
    sizes = {}
    for tensor in request.inputs:
        if tensor.name in sizes:
            raise WireError(tensor.name, "is named twice in inputs")
        sizes[tensor.name] = _binary_size(tensor)
    rest, told = len(body) - size, sum(found or 0 for found in sizes.values())
    if rest != told:
        raise MalformedError("body", f"has {rest} bytes after its JSON, and the inputs' {SIZE} make {told}")
    arrays = {}
    tail = memoryview(body)[size:]
    for tensor in request.inputs:
        binary = sizes[tensor.name]
        arrays[tensor.name] = _decode(tensor, None if binary is None else tail[:binary])
        tail = tail[binary or 0 :]
    return Inference(request, arrays)


def _binary_size(tensor: InferInput) -> int | None:
    """Bytes of it after the JSON, None when its data is in there. Raises WireError."""
    size = tensor.parameters.get(SIZE)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**63):
        raise WireError(tensor.name, f"{SIZE} must be a number of bytes, got {str(size)[:40]}")
    if (size is None) == (tensor.data is None):
        has = "both data and" if tensor.data is not None else "neither data nor"
        raise WireError(tensor.name, f"has {has} {SIZE}; one of them is needed, and no other place is read")
    return size


def _decode(tensor: InferInput, data: memoryview | None) -> Array:
    """A writable array. Raises WireError."""
    name, shape = tensor.name, tensor.shape
    if tensor.datatype == "BYTES":
        return _strings(name, shape, tensor.data if data is None else data)
    dtype = DTYPES[tensor.datatype]
    need = byte_size(name, dtype, shape)
    if data is None:
        return decode_tensor(name, TensorBody.model_validate({"dtype": dtype, "shape": shape, "data": tensor.data}))
    if len(data) != need:
        raise WireError(name, f"{SIZE} is {len(data)}, and shape {shape} of {tensor.datatype} needs {need}")
    return from_bytes(name, dtype, shape, bytearray(data))


def _strings(name: str, shape: Sequence[int], data: list[Any] | memoryview | None) -> Array:
    byte_size(name, "uint8", shape)
    count = math.prod(shape)
    if count > MAX_STRINGS:
        raise WireError(name, f"may hold {MAX_STRINGS} strings, got shape {list(shape)}")
    if isinstance(data, memoryview):
        found = _split(name, count, data)
    else:
        texts = flatten(name, data or [], shape)
        if not all(isinstance(text, str) for text in texts):
            raise WireError(name, "data must be strings where BYTES is meant")
        found = [text.encode() for text in texts]
    array = np.empty(count, dtype=object)
    array[:] = found
    return array.reshape(shape)


def _split(name: str, count: int, data: memoryview) -> list[bytes]:
    strings, at = [], 0
    for _ in range(count):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        if at > len(data):
            raise WireError(name, f"its {count} strings are longer than its {len(data)} bytes")
        strings.append(bytes(data[start:at]))
    if at != len(data):
        raise WireError(name, f"has {len(data)} bytes, and its {count} strings take {at}")
    return strings


# ---- a reply --------------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """`header`: bytes of JSON that it begins with; None when it is nothing else."""

    body: bytes
    header: int | None


def write_infer(told: Mapping[str, Any], outputs: Mapping[str, Array], binary: Collection[str]) -> Written:
    """`told`: the reply without its outputs. Those that are `binary` go after the JSON; so do, whatever is asked, those
    with a NaN or an infinity, for which JSON has no name."""
    tensors: list[dict[str, Any]] = []
    parts: list[bytes | memoryview] = []
    for name, array in outputs.items():
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": DATATYPES[array.dtype.name],
            "shape": list(array.shape),
        }
        if name in binary or (array.dtype.kind == "f" and not np.isfinite(array).all()):
            parts.append(_joined(array) if array.dtype == object else raw_bytes(plain_array(name, array)))
            tensor["parameters"] = {SIZE: len(parts[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        tensors.append(tensor)
    header = to_json({**told, "outputs": tensors})
    return Written(b"".join([header, *parts]), len(header) if parts else None)


def _joined(strings: Array) -> bytes:
    return b"".join(part for string in strings.flat for part in (len(string).to_bytes(4, "little"), string))


def strings(texts: Sequence[str]) -> Array:
    """(len(texts),), as a BYTES tensor is in memory."""
    array = np.empty(len(texts), dtype=object)
    array[:] = [text.encode() for text in texts]
    return array
