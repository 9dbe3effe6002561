"""The GGUF container: a header of typed key-values, a table of tensors, and their data, mapped from disk.

    magic "GGUF" | version u32 | tensor count u64 | key-value count u64
    key-values:  key text | type u32 | value     a text is length u64, UTF-8; an array is type u32, count u64, items
    tensors:     name text | dims u32 | dim u64 ... | type u32 | offset u64          dims are innermost first
    padding to the alignment | tensor data, each at data start + offset

Source: ggml-org/ggml docs/gguf.md, versions 2 and 3, little endian. The reader is our own because the `gguf` package's
takes 2 to 3 s for a vocabulary (it builds several numpy objects per item; this one takes 0.1 s) and believes the counts
it reads. Here every count is checked against the bytes that are left before anything is allocated, so a forged file is
refused at once. The block formats of quantised data are the package's.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from engine.errors import InvalidInput

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_TEXT, _ARRAY = 8, 9
_HEADER_BYTES = 64 * 2**20  # the header of a 262,144-token vocabulary is about 15 MB
_COUNT = 2**22  # tensors, keys, items of an array
_DIMS = 4
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """`shape` is outermost first, as numpy's; `start` and `size` are bytes of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


class GGUFFile:
    """`metadata`: texts, ints, floats, bools, lists of texts, or numpy arrays. `tensors`: by name.

    Raises InvalidInput("model", ...) for a file that is not whole and consistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._data: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
            self._cursor = _Cursor(self._data.data)
            self._read_header()
        except OSError as error:
            raise InvalidInput("model", f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, struct.error) as error:  # forged counts, bad UTF-8, an empty file
            raise InvalidInput("model", f"{path} is not a whole GGUF file: {error}") from error

    def read(self, name: str) -> NDArray[np.float32]:
        """The tensor's exact values as float32, in its shape."""
        tensor = self.tensors[name]
        raw = np.asarray(self._data)[tensor.start : tensor.start + tensor.size]
        rows = math.prod(tensor.shape[:-1])
        try:
            values: NDArray[np.float32] = dequantize(raw.reshape(rows, -1), tensor.kind)
        except NotImplementedError as error:
            raise InvalidInput("model", f"tensor {name!r}: type {tensor.kind.name} is not supported") from error
        return values.reshape(tensor.shape)

    def _read_header(self) -> None:
        cursor = self._cursor
        if bytes(cursor.take(4)) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = cursor.number(_U32)
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3, little endian")
        tensor_count, key_count = cursor.count(24), cursor.count(13)  # the least bytes one of each takes
        for _ in range(key_count):
            key = cursor.text()
            if key in self.metadata:
                raise ValueError(f"key {key!r} is there twice")
            self.metadata[key] = cursor.value(cursor.number(_U32))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {alignment!r} is not a power of two")
        data_start = -(-cursor.at // alignment) * alignment
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise ValueError(f"tensor {name!r} is there twice")
            size = _byte_size(name, shape, kind)
            if data_start + offset + size > len(self._data):
                raise ValueError(f"tensor {name!r} ends past the end of the file")
            self.tensors[name] = GGUFTensor(shape, kind, data_start + offset, size)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        cursor = self._cursor
        name, dims = cursor.text(), cursor.number(_U32)
        if not 1 <= dims <= _DIMS:
            raise ValueError(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(reversed([cursor.number(_U64) for _ in range(dims)]))
        return name, shape, GGMLQuantizationType(cursor.number(_U32)), cursor.number(_U64)


def _byte_size(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"tensor {name!r} of type {kind.name} cannot have shape {list(shape)}")
    size: int = math.prod(shape) // block * block_bytes
    return size


class _Cursor:
    """Reads forward through the header; a read past the end, or past any plausible header, raises ValueError."""

    def __init__(self, data: memoryview) -> None:
        self.data = data[:_HEADER_BYTES]
        self.at = 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes are announced at byte {self.at}, {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, layout: struct.Struct) -> int:
        value: int = layout.unpack(self.take(layout.size))[0]
        return value

    def count(self, least_bytes: int) -> int:
        """A u64 that so many items of at least `least_bytes` must follow."""
        count = self.number(_U64)
        if count > _COUNT or count * least_bytes > len(self.data) - self.at:
            raise ValueError(
                f"{count} items are announced at byte {self.at}, {len(self.data) - self.at} bytes are left"
            )
        return count

    def text(self) -> str:
        return str(self.take(self.number(_U64)), "utf-8")

    def value(self, kind: int) -> Any:  # noqa: ANN401  a GGUF value is one of the types its kind says
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            kind = self.number(_U32)
            if kind == _TEXT:
                return self._texts(self.count(8))
            layout = _scalar(kind)
            count = self.count(layout.itemsize)
            return np.frombuffer(self.take(count * layout.itemsize), layout)
        layout = _scalar(kind)
        return np.frombuffer(self.take(layout.itemsize), layout)[0].item()

    def _texts(self, count: int) -> list[str]:
        """`text()` unrolled: a vocabulary and its merges are 100,000 of them."""
        data, at, end, unpack = self.data, self.at, len(self.data), _U64.unpack_from
        texts = []
        for _ in range(count):
            size: int = unpack(data, at)[0]
            at += 8
            if size > end - at:
                raise ValueError(f"a text of {size} bytes is announced at byte {at}, {end - at} are left")
            texts.append(str(data[at : at + size], "utf-8"))
            at += size
        self.at = at
        return texts


def _scalar(kind: int) -> np.dtype[Any]:
    if kind not in _SCALARS:
        raise ValueError(f"value type {kind} is not known, or nested")
    return np.dtype(_SCALARS[kind])
