"""A session's past as a file: what `GET` and `PUT /v1/sessions/{id}/past` carry, for the service and the client alike.

A safetensors file in MindSpore's layout. B rows, N key/value heads, d channels a head, T slots; what stands in a slot
past a row's valid length is zero in a file that is written, and ignored in one that is read.

    key_past.{layer}      (B, N, d, T)  float16 or float32 (a bfloat16 past is widened)
    value_past.{layer}    (B, N, T, d)  likewise
    batch_valid_length    (B,)          int32
    token_ids             (B, T)        int64, of models that keep the ids they read

    __metadata__          format, kind, fingerprint (the model's), digest (`wire.digest` of the tensors)
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self

import numpy as np

from keypast.wire import Array, WireError, digest, load_tensors, tensor_parts

FORMAT = "keypast-past/1"
LENGTHS = "batch_valid_length"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Past:
    """`arrays` by name, those above but for the lengths, which `valid_length` holds: one a row. `kind` and
    `fingerprint` are those of the model (`GET /v1/models`) whose keys and values these are."""

    arrays: dict[str, Array]
    valid_length: list[int]
    kind: str
    fingerprint: str

    @property
    def layers(self) -> int:
        return sum(name.startswith("key_past.") for name in self.arrays)

    @property
    def digest(self) -> str:
        """Equal for equal pasts, whatever their models are."""
        return digest(self._tensors())

    def key(self, layer: int = 0) -> Array:
        """(B, N, d, T)"""
        return self.arrays[f"key_past.{layer}"]

    def value(self, layer: int = 0) -> Array:
        """(B, N, T, d)"""
        return self.arrays[f"value_past.{layer}"]

    @property
    def token_ids(self) -> Array | None:
        """(B, T) int64, None for a model that keeps none."""
        return self.arrays.get("token_ids")

    def to_bytes(self) -> bytes:
        """The file; equal pasts give equal bytes. Raises WireError naming an array whose dtype cannot travel."""
        return b"".join(self.parts())

    def parts(self) -> list[bytes | memoryview]:
        """The file in parts, without a copy of the arrays. Raises WireError."""
        tensors = self._tensors()
        about = {"format": FORMAT, "kind": self.kind, "fingerprint": self.fingerprint, "digest": digest(tensors)}
        return tensor_parts(tensors, about)

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        """Raises WireError naming what is off: another format, a damaged tensor, lengths that are none; MalformedError
        for what is not a safetensors file. Whether it is a past of a given model is for the service to say."""
        tensors, about = load_tensors(body, finite=False)
        if (given := about.get("format", "")) != FORMAT:
            raise WireError("format", f"must be {FORMAT!r} in the file's metadata, got {given[:80]!r}")
        for name in ("kind", "fingerprint", "digest"):
            if name not in about:
                raise WireError(name, "is required in the file's metadata")
        if about["digest"] != (found := digest(tensors)):
            raise WireError("digest", f"the tensors have {found}, the metadata says {about['digest'][:80]}: damaged")
        lengths = tensors.pop(LENGTHS, None)
        if lengths is None:
            raise WireError(LENGTHS, "is required, int32 (B,)")
        if lengths.dtype != np.int32 or lengths.ndim != 1:
            raise WireError(LENGTHS, f"must be int32 (B,), got {lengths.dtype.name} {lengths.shape}")
        return cls(tensors, lengths.tolist(), about["kind"], about["fingerprint"])

    def save(self, path: str | PathLike[str]) -> None:
        with Path(path).open("wb") as file:
            file.writelines(self.parts())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Raises WireError as `from_bytes` does, and OSError."""
        return cls.from_bytes(Path(path).read_bytes())

    def __repr__(self) -> str:
        return f"<Past {self.kind} {self.layers} layers {self.valid_length}>"

    def _tensors(self) -> dict[str, Array]:
        return {**self.arrays, LENGTHS: np.array(self.valid_length, dtype=np.int32)}
