"""The file of a past: written and read again, and refused by name when it is off."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from keypast import wire
from keypast.past import FORMAT, Past
from keypast.wire import Array, WireError


def past(lengths: list[int], dtype: str = "float16", layers: int = 2) -> Past:
    rows, slots = len(lengths), max(lengths)
    generator = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for layer in range(layers):
        arrays[f"key_past.{layer}"] = generator.normal(size=(rows, 3, 4, slots)).astype(dtype)
        arrays[f"value_past.{layer}"] = generator.normal(size=(rows, 3, slots, 4)).astype(dtype)
    arrays["token_ids"] = generator.integers(0, 99, (rows, slots))
    return Past(arrays, lengths, "decoder", "f" * 64)


def about(body: bytes) -> dict[str, str]:
    return wire.load_tensors(body).metadata


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.sampled_from(["float16", "float32"]))
def test_a_file_comes_back(lengths: list[int], dtype: str) -> None:
    written = past(lengths, dtype)
    read = Past.from_bytes(written.to_bytes())
    assert (read.valid_length, read.kind, read.fingerprint) == (lengths, "decoder", "f" * 64)
    assert set(read.arrays) == set(written.arrays)
    for name, array in written.arrays.items():
        assert (read.arrays[name].dtype, read.arrays[name].tolist()) == (array.dtype, array.tolist())
    assert (read.digest, read.to_bytes()) == (written.digest, written.to_bytes())


def test_any_reader_of_safetensors_reads_it() -> None:
    written = past([3, 5])
    tensors = load(written.to_bytes())
    assert tensors.pop("batch_valid_length").tolist() == [3, 5]
    assert set(tensors) == {"key_past.0", "key_past.1", "value_past.0", "value_past.1", "token_ids"}
    assert about(written.to_bytes()) == {
        "format": "keypast-past/1",
        "kind": "decoder",
        "fingerprint": "f" * 64,
        "digest": written.digest,
    }


def test_its_parts_have_names() -> None:
    one = past([3, 5])
    assert repr(one) == "<Past decoder 2 layers [3, 5]>"
    assert (one.layers, one.key(1).shape, one.value(1).shape) == (2, (2, 3, 4, 5), (2, 3, 5, 4))
    assert one.token_ids is not None
    assert one.token_ids.shape == (2, 5)
    del one.arrays["token_ids"]
    assert one.token_ids is None


def test_it_can_be_kept_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "session.past"
    past([3]).save(path)
    assert Past.load(path).digest == past([3]).digest
    with pytest.raises(FileNotFoundError):
        Past.load(tmp_path / "nothing")


def test_the_digest_is_of_tensors_and_lengths() -> None:
    one, other = past([3, 5]), past([3, 5])
    assert one.digest == other.digest
    assert Past(one.arrays, [2, 5], one.kind, one.fingerprint).digest != one.digest
    other.arrays["key_past.1"][0, 0, 0, 0] += 1
    assert other.digest != one.digest


def tensors() -> dict[str, Array]:
    return {**past([3, 5]).arrays, "batch_valid_length": np.array([3, 5], np.int32)}


def body(tensors: dict[str, Array], **metadata: str | None) -> bytes:
    full = {"format": FORMAT, "kind": "decoder", "fingerprint": "f", "digest": wire.digest(tensors), **metadata}
    return wire.dump_tensors(tensors, {name: text for name, text in full.items() if text is not None})


@pytest.mark.parametrize(
    ("file", "field", "message"),
    [
        (wire.dump_tensors(tensors(), {}), "format", "must be 'keypast-past/1'"),
        (body(tensors(), format="keypast-past/2"), "format", "got 'keypast-past/2'"),
        (body(tensors(), kind=None), "kind", "is required"),
        (body(tensors(), fingerprint=None), "fingerprint", "is required"),
        (body(tensors(), digest=None), "digest", "is required"),
        (body(tensors(), digest="sha256:0"), "digest", "the metadata says sha256:0"),
        (body(past([3]).arrays), "batch_valid_length", "is required"),
        (body({**tensors(), "batch_valid_length": np.array([3, 5])}), "batch_valid_length", "must be int32"),
        (body({**tensors(), "batch_valid_length": np.ones((2, 1), np.int32)}), "batch_valid_length", r"\(2, 1\)"),
    ],
)
def test_a_file_that_is_off(file: bytes, field: str, message: str) -> None:
    with pytest.raises(WireError, match=message) as caught:
        Past.from_bytes(file)
    assert caught.value.field == field


def test_a_damaged_file() -> None:
    whole = past([3, 5]).to_bytes()
    with pytest.raises(WireError, match="damaged"):
        Past.from_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for broken in (b"", whole[:-1], whole + b"x"):
        with pytest.raises(wire.MalformedError):
            Past.from_bytes(broken)


def test_values_that_are_not_finite_travel_as_they_are() -> None:
    """A slot past the valid length may hold anything; the service looks at the others."""
    one = past([3, 5])
    one.arrays["key_past.0"][0, 0, 0, 4] = np.nan
    assert np.isnan(Past.from_bytes(one.to_bytes()).key()[0, 0, 0, 4])


def test_an_array_that_cannot_travel() -> None:
    one = past([3])
    one.arrays["key_past.0"] = one.arrays["key_past.0"].astype(np.float64)
    with pytest.raises(WireError, match=r"key_past\.0: dtype float64"):
        one.to_bytes()
