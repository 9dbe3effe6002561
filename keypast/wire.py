"""Tensors to bytes and back, for the service and the client alike. Numpy arrays are the form in memory; no torch.

    form         where the tensors are                                       content type
    flat         JSON: {"dtype", "shape", "data": [1, 2, ..]}                application/json
    nested       JSON: {"dtype", "shape", "data": [[1, ..], ..]}             application/json
    base64       JSON: {"dtype", "shape", "data_b64": ".."}                  application/json
    safetensors  the whole body is one file, tensors by name                 application/vnd.safetensors

In a safetensors request the options ride as query parameters; in a safetensors reply the scalars go into
`__metadata__`, one JSON text a key, and the lengths, version and timings into the response headers as well.

Data is little-endian and row-major. Sizes are checked before anything is allocated for them. A bfloat16 tensor is
widened exactly to float32, since numpy has no such type. Inputs must be finite; outputs need not be, and as JSON has no
name for NaN and infinities such an output is sent as base64 whatever the form.
"""

import base64
import binascii
import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from safetensors import SafetensorError, deserialize

from keypast import schemas
from keypast.schemas import AppendReply, AppendRequest, TensorBody

Array = npt.NDArray[Any]
Form = Literal["flat", "nested", "base64", "safetensors"]
AnyModel = TypeVar("AnyModel", bound=BaseModel)

JSON_TYPE = "application/json"
MERGE_PATCH_TYPE = "application/merge-patch+json"
OCTETS_TYPE = "application/octet-stream"
SAFETENSORS_TYPE = "application/vnd.safetensors"
MAX_NAMES = 1 << 16  # in one JSON body; 512 steps of three tensors have 8,000
LONGEST_NAME = 128  # characters of a field that is told
MAX_ERRORS = 100  # of one body
MAX_HEADER_BYTES = 1 << 18  # of a safetensors file; ours hold a few names

ARRAY_INPUTS = ("query", "key", "value", "attention_mask")  # tensors in every form
LIST_INPUTS = ("token_ids", "batch_valid_length")  # lists in JSON, int tensors in safetensors

_ITEM_BYTES = {"float16": 2, "float32": 4, "bfloat16": 2, "int32": 4, "int64": 8, "uint8": 1, "bool": 1}
_SAFETENSORS_DTYPES = {
    "F16": "float16",
    "F32": "float32",
    "BF16": "bfloat16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "BOOL": "bool",
}
_SAFETENSORS_NAMES = {name: short for short, name in _SAFETENSORS_DTYPES.items()}
_LITTLE_ENDIAN = {name: np.dtype(name).newbyteorder("<") for name in _ITEM_BYTES if name != "bfloat16"}
_NAMES = {dtype: name for name, dtype in _LITTLE_ENDIAN.items()}
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"(\s*+:)?)?', re.DOTALL)  # whole, so that no byte is looked at twice
_UNION_BRANCH = re.compile(r"(bool|float|int|str|constrained-str|constrained-int|list\[.*\]|function-.*)")


class WireError(ValueError):
    """`field` is the tensor's or option's name, "body" when it is the whole; the message says what would be right."""

    def __init__(self, field: str, message: str) -> None:
        field = field if len(field) <= LONGEST_NAME else f"{field[:LONGEST_NAME]}.."  # it may be the client's own word
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class MalformedError(WireError):
    """Not JSON, or not a safetensors file: status 400 where a plain WireError is 422."""


class UnsupportedMediaError(WireError):
    """Neither JSON nor safetensors: status 415."""


# ---- one tensor in JSON ---------------------------------------------------------------------------------------------


def decode_tensor(field: str, body: TensorBody, *, finite: bool = True) -> Array:
    """A writable array of the body's shape; bfloat16 comes as float32.

    Raises WireError: size and shape disagree, ragged nesting, a value the dtype cannot hold, not finite.
    """
    size = byte_size(field, body.dtype, body.shape)
    if body.data_b64 is not None:
        array = from_bytes(field, body.dtype, body.shape, _unbase64(field, body.data_b64, size))
        return check_finite(field, array) if finite else array
    assert body.data is not None  # TensorBody holds exactly one
    numbers = flatten(field, body.data, body.shape)
    return _from_numbers(field, body.dtype, numbers).reshape(body.shape)


def encode_tensor(array: Array, form: Form) -> dict[str, Any]:
    """The JSON object of an array; numbers that JSON cannot name turn flat and nested into base64."""
    array = plain_array("tensor", array)
    body: dict[str, Any] = {"dtype": _name(array), "shape": list(array.shape)}
    if form == "base64" or not np.isfinite(array).all():
        return {**body, "data_b64": base64.b64encode(array.tobytes()).decode("ascii")}
    return {**body, "data": array.tolist() if form == "nested" and array.ndim else array.ravel().tolist()}


def byte_size(field: str, dtype: str, shape: Sequence[int]) -> int:
    """Bytes on the wire. A zero axis must not hide a product that overflows. Raises WireError."""
    size = _ITEM_BYTES[dtype] * math.prod(shape)
    if size >= 2**63 or (not size and _ITEM_BYTES[dtype] * math.prod(max(extent, 1) for extent in shape) >= 2**63):
        raise WireError(field, f"shape {list(shape)} is too large")
    return size


def _unbase64(field: str, text: str, size: int) -> bytearray:
    if len(text) != (size + 2) // 3 * 4:
        raise WireError(field, f"data_b64 has {len(text)} characters, but {size} bytes need {(size + 2) // 3 * 4}")
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise WireError(field, f"data_b64 is not base64: {error}") from None
    if len(data) != size:
        raise WireError(field, f"data_b64 holds {len(data)} bytes where the shape needs {size}")
    return bytearray(data)


def from_bytes(field: str, dtype: str, shape: Sequence[int], data: bytearray) -> Array:
    """A view of the bytes, `byte_size` of them; bfloat16 is widened. Raises WireError."""
    if dtype == "bfloat16":
        return _widen(np.frombuffer(data, dtype="<u2")).reshape(shape)
    if dtype == "bool" and data.strip(b"\0\1"):
        raise WireError(field, "a bool is one byte, 0 or 1")
    return np.frombuffer(data, dtype=_LITTLE_ENDIAN[dtype]).reshape(shape)


def _widen(halves: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def flatten(field: str, data: list[Any], shape: Sequence[int]) -> list[Any]:
    """As many entries as the shape has, of flat or nested data. Raises WireError."""
    if not (data and isinstance(data[0], list)):
        if len(data) != math.prod(shape):
            raise WireError(field, f"{len(data)} numbers where shape {list(shape)} needs {math.prod(shape)}")
        return data
    items: list[Any] = [data]
    for axis, extent in enumerate(shape):
        for item in items:
            if not isinstance(item, list) or len(item) != extent:
                raise WireError(field, f"nested data does not have {extent} entries everywhere on axis {axis}")
        items = list(chain.from_iterable(items))
    return items


def _from_numbers(field: str, dtype: str, numbers: list[Any]) -> Array:
    """(len(numbers),) of that dtype; every value must be of its kind and fit."""
    is_float = dtype in ("float16", "float32", "bfloat16")
    kinds: set[type] = {int, float} if is_float else {int, bool} if dtype == "bool" else {int}
    if wrong := set(map(type, numbers)) - kinds:
        names = ", ".join(sorted(kind.__name__ for kind in wrong))
        raise WireError(field, f"data holds {names} where {dtype} is meant")
    try:
        if not is_float:
            array = np.array(numbers, dtype="uint8" if dtype == "bool" else dtype)
            return array if dtype != "bool" else _bools(field, array)
        wide = np.array(numbers, dtype=np.float64)
    except OverflowError:
        raise WireError(field, f"a number does not fit {dtype}") from None
    check_finite(field, wide)
    with np.errstate(over="ignore"):  # what overflows is refused by name on the next lines
        narrow = wide.astype("float16" if dtype == "float16" else "float32")
        if dtype == "bfloat16":
            narrow = _round_to_bfloat16(narrow)
    if not np.isfinite(narrow).all():
        raise WireError(field, f"a number does not fit {dtype}")
    return narrow


def _bools(field: str, array: Array) -> Array:
    if array.size and array.max() > 1:
        raise WireError(field, "a bool is true, false, 0 or 1")
    return array.astype(np.bool_)


def _round_to_bfloat16(array: Array) -> Array:
    """To the nearest bfloat16, ties to even, still as float32."""
    bits = array.view(np.uint32).astype(np.uint64)
    return _widen(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))


def check_finite(field: str, array: Array) -> Array:
    """The array. Raises WireError naming the field."""
    if not np.isfinite(array).all():
        raise WireError(field, "holds NaN or an infinity; inputs must be finite")
    return array


def plain_array(field: str, array: Array) -> Array:
    """Contiguous and little-endian, so that its bytes are the wire's."""
    if array.dtype in _NAMES and array.flags.c_contiguous:
        return array
    if _name(array) not in _ITEM_BYTES:
        raise WireError(field, f"dtype {array.dtype.name} cannot travel; one of {', '.join(_ITEM_BYTES)} can")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _name(array: Array) -> str:
    """array.dtype.name, which numpy puts together anew each time."""
    return _NAMES.get(array.dtype) or array.dtype.name


def raw_bytes(array: Array) -> memoryview:
    """The bytes of a `_plain` array, not copied."""
    return array.reshape(-1).view(np.uint8).data


# ---- a safetensors body ---------------------------------------------------------------------------------------------


class Tensors(NamedTuple):
    arrays: dict[str, Array]
    metadata: dict[str, str]


def load_tensors(body: bytes, *, finite: bool = True) -> Tensors:
    """Writable arrays and metadata by name; bfloat16 comes as float32.

    Raises MalformedError for what is not a safetensors file, WireError naming the tensor otherwise.
    """
    metadata = _header(body).get("__metadata__") or {}
    try:
        # the library checks offsets, gaps, overlaps and sizes against the body
        views = deserialize(body)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise MalformedError("body", f"not a safetensors file: {error}") from None
    arrays = {}
    for name, view in views:
        dtype = _SAFETENSORS_DTYPES.get(view["dtype"])
        if dtype is None:
            raise WireError(name, f"dtype {view['dtype']} is not one of {', '.join(_SAFETENSORS_DTYPES)}")
        byte_size(name, dtype, view["shape"])
        data = view["data"]  # a bytearray of its own, or bytes in older versions
        array = from_bytes(name, dtype, view["shape"], data if isinstance(data, bytearray) else bytearray(data))
        arrays[name] = check_finite(name, array) if finite else array
    return Tensors(arrays, metadata)


def dump_tensors(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """The same bytes for the same content, which the library does not promise: its header's order varies.

    Raises WireError naming the array whose dtype cannot travel.
    """
    return b"".join(tensor_parts(arrays, metadata))


def tensor_parts(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """The same file in parts, the arrays' own memory wherever that is possible."""
    plain = {name: plain_array(name, array) for name, array in arrays.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data: list[memoryview] = []
    end = 0
    for name in sorted(plain, key=lambda name: (-plain[name].itemsize, name)):  # the widest first: all are aligned
        array = plain[name]
        start, end = end, end + array.nbytes
        dtype = _SAFETENSORS_NAMES[_name(array)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
        data.append(raw_bytes(array))
    text = to_json(header)
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text, *data]


def digest(arrays: Mapping[str, Array]) -> str:
    """`sha256:` and the hex digest over every array, in the order of their names: a line `name dtype d0,d1,..`, then
    its bytes. Raises WireError naming the array whose dtype cannot travel."""
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        array = plain_array(name, arrays[name])
        hashed.update(f"{name} {_name(array)} {','.join(map(str, array.shape))}\n".encode())
        hashed.update(raw_bytes(array))
    return f"sha256:{hashed.hexdigest()}"


def _header(body: bytes) -> dict[str, Any]:
    """The library would take the later of two equal names without a word; the rest of the header it checks itself."""
    length = struct.unpack_from("<Q", body)[0] if len(body) >= 8 else 0
    if not 2 <= length <= min(len(body) - 8, MAX_HEADER_BYTES):
        raise MalformedError("body", f"not a safetensors file: a header of {length} bytes in a body of {len(body)}")
    try:
        header = _HEADER.decode(body[8 : 8 + length].decode())
    except (ValueError, RecursionError) as error:
        if isinstance(error, WireError):
            raise
        raise MalformedError("body", "not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise MalformedError("body", "not a safetensors file: its header is not an object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise WireError("body", f"{ascii(name)[:80]} is named twice")
        names[name] = value
    return names


_HEADER = json.JSONDecoder(object_pairs_hook=_unique)


# ---- options as query parameters ------------------------------------------------------------------------------------


def encode_options(options: Mapping[str, Any]) -> dict[str, str]:
    """Query parameters: a string stays itself unless it reads as JSON; everything else is JSON text."""
    return {name: _encode_option(value) for name, value in options.items()}


def decode_options(query: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The inverse of `encode_options`, for any strings. Raises WireError: a parameter is named twice."""
    options: dict[str, Any] = {}
    for name, text in query:
        if name in options:
            raise WireError(name, "named twice in the query")
        options[name] = _decode_option(text)
    return options


def _encode_option(value: object) -> str:
    if isinstance(value, str) and _decode_option(value) is value:
        return value
    return json.dumps(value, separators=(",", ":"))


def _decode_option(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# ---- whole bodies ---------------------------------------------------------------------------------------------------


def is_safetensors(content_type: str | None) -> bool:
    """False: JSON, which a missing content type means too. Raises UnsupportedMediaError."""
    return _media(content_type, JSON_TYPE, SAFETENSORS_TYPE) == SAFETENSORS_TYPE


def check_safetensors(content_type: str | None) -> None:
    """For a body that can be nothing else. Raises UnsupportedMediaError."""
    _media(content_type, SAFETENSORS_TYPE)


def _media(content_type: str | None, *read: str) -> str:
    media = (content_type or JSON_TYPE).partition(";")[0].strip().lower()
    if media not in read:
        raise UnsupportedMediaError("Content-Type", f"{media[:80]} is not read here; send {' or '.join(read)}")
    return media


def reply_form(request_form: Form, accept: str | None) -> Form:
    """The request's own form, unless Accept names only the other content type."""
    named = {part.partition(";")[0].strip().lower() for part in (accept or "").split(",")}
    if SAFETENSORS_TYPE in named:
        return "safetensors"
    return "base64" if request_form == "safetensors" and JSON_TYPE in named else request_form


class AppendBody(NamedTuple):
    """An append as read. `arrays` holds the ARRAY_INPUTS that came; the request's own fields of these are not used."""

    request: AppendRequest
    arrays: dict[str, Array]
    form: Form


class Encoded(NamedTuple):
    """`query` is empty for a reply, `headers` for a request; `content_type` is not repeated in them."""

    body: bytes
    content_type: str
    query: dict[str, str]
    headers: dict[str, str]


def read_append(
    request_type: type[AppendRequest], content_type: str | None, body: bytes, query: Sequence[tuple[str, str]]
) -> AppendBody:
    """The body of a prefill or a step. Raises WireError and its two children, nothing else."""
    if is_safetensors(content_type):
        return _read_safetensors_append(request_type, body, query)
    if query:
        raise WireError(query[0][0], "not a query parameter; with a JSON body, options go into the body")
    return json_append(validated(request_type, body))


def json_append(request: AppendRequest) -> AppendBody:
    """With its tensors as arrays. Raises WireError."""
    bodies: dict[str, TensorBody] = {name: getattr(request, name) for name in ARRAY_INPUTS}
    arrays = {name: decode_tensor(name, tensor) for name, tensor in bodies.items() if tensor is not None}
    return AppendBody(request, arrays, next((_json_form(tensor) for tensor in bodies.values() if tensor), "nested"))


def _read_safetensors_append(
    request_type: type[AppendRequest], body: bytes, query: Sequence[tuple[str, str]]
) -> AppendBody:
    # whether they are finite is looked at where they are admitted, as for those who need no wire
    return binary_append(request_type, decode_options(query), load_tensors(body, finite=False).arrays)


def binary_append(
    request_type: type[AppendRequest], options: Mapping[str, Any], arrays: dict[str, Array]
) -> AppendBody:
    """Of a file's tensors, and the options that came beside them. Raises WireError."""
    for name in arrays:
        if name not in ARRAY_INPUTS + LIST_INPUTS:
            raise WireError(name, f"not an input; those are {', '.join(ARRAY_INPUTS + LIST_INPUTS)}")
    for name in options:
        if name in ARRAY_INPUTS or name in arrays:
            raise WireError(name, "is a tensor: it belongs into the file, and not beside it")
    lists = {name: arrays.pop(name).tolist() for name in LIST_INPUTS if name in arrays}
    return AppendBody(validated(request_type, {**options, **lists}), arrays, "safetensors")


def write_append(request: AppendRequest, arrays: Mapping[str, Array], form: Form) -> Encoded:
    """What `read_append` reads. Only the fields that were set travel; without arrays the body is JSON in any form."""
    options = request.model_dump(exclude_unset=True, exclude_none=True, exclude=set(ARRAY_INPUTS))
    if form == "safetensors" and arrays:
        return Encoded(dump_tensors(arrays, {}), SAFETENSORS_TYPE, encode_options(options), {})
    tensors = {name: encode_tensor(array, form) for name, array in arrays.items()}
    return Encoded(to_json(options | tensors), JSON_TYPE, {}, {})


def write_reply(
    told: Mapping[str, Any], outputs: Mapping[str, Any], arrays: Mapping[str, Array], form: Form
) -> Encoded:
    """`told`: the fields of an Appended. `outputs`: those that are no arrays, without None. And the arrays by name; the
    headers are those that every reply to an append carries."""
    headers = reply_headers(told)
    if form == "safetensors":
        metadata = {name: to_json(value).decode() for name, value in (*told.items(), *outputs.items())}
        return Encoded(dump_tensors(arrays, metadata), SAFETENSORS_TYPE, {}, headers)
    tensors = {name: encode_tensor(array, form) for name, array in arrays.items()}
    return Encoded(to_json({"outputs": {**tensors, **outputs}, **told}), JSON_TYPE, {}, headers)


def read_reply(content_type: str | None, body: bytes) -> tuple[AppendReply, dict[str, Array]]:
    """What `write_reply` wrote. Raises WireError and its children."""
    if not is_safetensors(content_type):
        reply = validated(AppendReply, body)
        return reply, output_arrays(reply)
    arrays, metadata = load_tensors(body, finite=False)
    scalars = {name: _decode_option(text) for name, text in metadata.items()}
    return validated(AppendReply, {**scalars, "outputs": scalars}), arrays


def output_arrays(reply: AppendReply) -> dict[str, Array]:
    """Those that a JSON reply holds. Raises WireError."""
    bodies = {name: getattr(reply.outputs, name) for name in ("attn_out", "attn_weights", "logits")}
    return {name: decode_tensor(name, tensor, finite=False) for name, tensor in bodies.items() if tensor is not None}


def _json_form(tensor: TensorBody) -> Form:
    if tensor.data is None:
        return "base64"
    return "nested" if tensor.data and isinstance(tensor.data[0], list) else "flat"


def validated(model: type[AnyModel], source: bytes | dict[str, Any]) -> AnyModel:
    """JSON bytes, or a dict of Python values, as a wire model. Raises WireError, MalformedError."""
    if isinstance(source, bytes) and issubclass(model, schemas.Request):
        _count_names(source)
    try:
        return model.model_validate_json(source) if isinstance(source, bytes) else model.model_validate(source)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:  # telling of the first would tell of all of them
            raise WireError("body", f"{error.error_count()} things are wrong with it") from None
        raise validation_error(error.errors(include_url=False)[0]) from None


def _count_names(body: bytes) -> None:
    """Raises MalformedError for JSON of more names than any request needs: each takes many times its size."""
    if body.count(b":") <= MAX_NAMES:
        return
    names = (string for string in _STRING.finditer(body) if string[1] is not None)
    if next(islice(names, MAX_NAMES, None), None) is not None:
        raise MalformedError("body", f"has more than {MAX_NAMES} names")


def validation_error(first: Mapping[str, Any]) -> WireError:
    """The first of pydantic's `errors()` in the caller's words: `sample.temperature`, `token_ids[0][3]`."""
    if first["type"] == "json_invalid":
        return MalformedError("body", first["msg"])
    named = [part for part in first["loc"] if isinstance(part, int) or not _UNION_BRANCH.fullmatch(part)]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named).lstrip(".")
    return WireError(path or "body", first["msg"].removeprefix("Value error, "))


# ---- headers --------------------------------------------------------------------------------------------------------


def reply_headers(told: Mapping[str, Any]) -> dict[str, str]:
    """ETag and the scalars of a reply to an append, `told`, for those who do not read the body."""
    version, timings = str(told["version"]), told["timings"]
    return {
        "ETag": f'"{version}"',
        "Keypast-Version": version,
        "Keypast-Past-Length": ",".join(map(str, told["past_length"])),
        "Keypast-Valid-Length": ",".join(map(str, told["valid_length"])),
        "Keypast-Computed": ",".join(map(str, told["computed"])),
        "Keypast-Reused": ",".join(map(str, told["reused"])),
        "Keypast-Shared": ",".join(map(str, told["shared"])),
        "Keypast-Queue-Ms": f"{timings['queue_ms']:.3f}",
        "Keypast-Compute-Ms": f"{timings['compute_ms']:.3f}",
    }


def etag(version: int) -> str:
    return f'"{version}"'


def parse_if_match(value: str | None) -> int | None:
    """The version that the caller expects; None when any will do (no header, or `*`). Raises WireError."""
    if value is None or value.strip() == "*":
        return None
    match = re.fullmatch(r'\s*"(\d{1,18})"\s*', value, re.ASCII)
    if match is None:
        raise WireError("If-Match", 'one version in quotes, as ETag gives it: "3"')
    return int(match[1])


def parse_key(values: Sequence[str]) -> str | None:
    """The request's Idempotency-Key, of all that it has. Raises WireError."""
    if not values:
        return None
    if len(values) > 1 or not re.fullmatch(r"[!-~]{1,255}", values[0]):
        raise WireError("Idempotency-Key", "one key of 1 to 255 visible ASCII characters")
    return values[0]
