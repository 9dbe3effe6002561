"""Files that are not what they say: refused at once, whatever they announce."""

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoints.gguf import convert
from engine.checkpoints.gguf_file import GGUFFile
from engine.errors import InvalidInput
from tests.engine.gguf_files import random_weights, write


def header(tensors: int = 0, keys: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes, announced: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if announced is None else announced) + value


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 2**62
FORGED = {
    "empty": b"",
    "not GGUF": b"PK\x03\x04" + b"\0" * 64,
    "short": b"GGUF\x03",
    "version 1": header(version=1),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many tensors": header(tensors=HUGE),
    "many keys": header(keys=HUGE),
    "long key": header(keys=1, rest=text(b"k", HUGE) + b"\0" * 64),
    "long text": header(keys=1, rest=text(b"k") + struct.pack("<I", 8) + text(b"v", HUGE)),
    "bad UTF-8": header(keys=1, rest=text(b"\xff") + struct.pack("<I", 4) + b"\0" * 4),
    "unknown type": header(keys=1, rest=text(b"k") + struct.pack("<I", 99) + b"\0" * 16),
    "long array": header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 4, HUGE) + b"\0" * 64),
    "long array of texts": header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, HUGE) + b"\0" * 64),
    "text in an array": header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1) + text(b"v", HUGE) + b"\0" * 64),
    "nested array": header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 64),
    "a key twice": header(keys=2, rest=2 * (text(b"k") + struct.pack("<II", 4, 7))),
    "alignment": header(keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3)),
    "no dimensions": header(tensors=1, rest=tensor(b"t", []) + b"\0" * 64),
    "many dimensions": header(tensors=1, rest=tensor(b"t", [1] * 9) + b"\0" * 64),
    "huge dimensions": header(tensors=1, rest=tensor(b"t", [HUGE, HUGE]) + b"\0" * 64),
    "zero dimension": header(tensors=1, rest=tensor(b"t", [0, HUGE]) + b"\0" * 64),
    "offset": header(tensors=1, rest=tensor(b"t", [4], offset=HUGE) + b"\0" * 64),
    "tensor type": header(tensors=1, rest=tensor(b"t", [4], kind=999) + b"\0" * 64),
    "part of a block": header(tensors=1, rest=tensor(b"t", [33], kind=8) + b"\0" * 128),
    "a tensor twice": header(tensors=2, rest=2 * tensor(b"t", [4]) + b"\0" * 128),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(FORGED[name])
    with pytest.raises(InvalidInput, match="not a whole GGUF file") as caught:
        convert(path, tmp_path / "cache")
    assert caught.value.field == "model"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a file"):
        convert(tmp_path / "absent.gguf", tmp_path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        GGUFFile(tmp_path / "absent.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", "llama", random_weights("llama")).read_bytes()


@settings(deadline=None)
@given(data=st.data())
def test_no_truncation_or_flipped_byte_crashes_the_reader(
    data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for at in data.draw(st.lists(st.integers(0, 2000), max_size=3)):
        if at < len(broken):
            broken[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "broken.gguf"
    path.write_bytes(broken)
    with contextlib.suppress(InvalidInput):
        GGUFFile(path)
