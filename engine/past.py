"""Whether a past may come into a session or go out of one, on arrays, shapes and lengths. Nothing of a device."""

import math

import numpy as np

from engine.admission import Room, check_fits, check_version
from engine.batch import Array, ExportPast, ImportPast, SessionPast
from engine.errors import InvalidInput, LengthExceeded, WrongState
from engine.session import Session
from engine.specs import ModelSpec

LENGTHS = "batch_valid_length"


def check_past(spec: ModelSpec, past: SessionPast, rows: int) -> None:
    """Whether it is of this model and whole; every valid value is read. Raises InvalidInput naming what is off."""
    for name, got, own in (("kind", past.kind, spec.kind), ("fingerprint", past.fingerprint, spec.fingerprint)):
        if got != own:
            raise InvalidInput(name, f"is {got[:80]!r}, model {spec.name} has {own!r}: the past is of another model")
    lengths = past.valid_length
    if len(lengths) != rows:
        raise InvalidInput(LENGTHS, f"has {len(lengths)} rows, the session has {rows}")
    slots = _check_arrays(spec, past, rows)
    if any(not 0 <= length <= slots for length in lengths):
        raise InvalidInput(LENGTHS, f"each must be 0 to {slots}, the past's slots, got {lengths}")
    for layer in range(spec.kv.layers):
        key, value = f"key_past.{layer}", f"value_past.{layer}"
        for row, length in enumerate(lengths):
            _check_values(spec, key, past.arrays[key][row, :, :, :length])
            _check_values(spec, value, past.arrays[value][row, :, :length])
    if spec.history is not None:
        _check_history(spec, past)


def import_positions(operation: ImportPast, session: Session, room: Room) -> list[int]:
    """How many positions each row gets. Raises Moved, WrongState, LengthExceeded."""
    check_version(operation.expected_version, session)
    if any(session.valid_length):
        raise WrongState("the session has a past: import into an empty one, or truncate this one to 0 first")
    lengths = operation.past.valid_length
    check_fits(LENGTHS, lengths, session, room)
    return lengths


def check_export(spec: ModelSpec, operation: ExportPast, session: Session, limit: int) -> None:
    """Raises Moved, LengthExceeded: rows are padded to the longest, so a file may be far larger than what is held."""
    check_version(operation.expected_version, session)
    rows, slots = len(session.sequences), max(session.valid_length)
    tensors = spec.past_tensors(rows, slots).values()
    size = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in tensors)
    if size > limit:
        padded = f"{rows} rows of {slots} positions" if rows > 1 else f"{slots} positions"
        raise LengthExceeded(
            "past", f"{padded} take {size} bytes, and {limit} may leave at once; truncate a fork of it"
        )


def export_past(spec: ModelSpec, session: Session, arrays: dict[str, Array]) -> SessionPast:
    """With the ids of its positions, zero past a row's length, when the model keeps them."""
    lengths = session.valid_length
    if spec.history is not None:
        ids = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
        for row, sequence in zip(ids, session.sequences, strict=True):
            row[: sequence.length] = sequence.history
        arrays = {**arrays, spec.history: ids}
    return SessionPast(arrays, lengths, spec.kind, spec.fingerprint)


def _check_arrays(spec: ModelSpec, past: SessionPast, rows: int) -> int:
    """Names, dtypes, shapes. Returns T, which the first layer's keys tell and all must have."""
    first = past.arrays.get("key_past.0")
    slots = first.shape[-1] if first is not None and first.ndim else 0
    expected = spec.past_tensors(rows, slots)
    for name in past.arrays:
        if name not in expected:
            raise InvalidInput(
                name, f"is not in a past of model {spec.name}, whose layers are 0 to {spec.kv.layers - 1}"
            )
    for name, (dtype, shape) in expected.items():
        array = past.arrays.get(name)
        if array is None:
            raise InvalidInput(name, f"is required: {dtype} {shape}")
        if array.dtype.name != dtype:
            raise InvalidInput(name, f"dtype must be {dtype}, got {array.dtype.name}")
        if array.shape != shape:
            raise InvalidInput(name, f"shape must be {shape}, got {array.shape}")
    return slots


def _check_values(spec: ModelSpec, name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise InvalidInput(name, "has NaN or infinite values; they would stay in the session's past")
    if spec.kv.dtype == "bfloat16" and (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any():
        raise InvalidInput(name, f"has values that the bfloat16 past of model {spec.name} does not hold exactly")


def _check_history(spec: ModelSpec, past: SessionPast) -> None:
    assert spec.history is not None
    values = next(tensor.values for tensor in spec.inputs if tensor.name == spec.history)
    ids = np.concatenate([row[:n] for row, n in zip(past.arrays[spec.history], past.valid_length, strict=True)])
    if values is not None and ids.size and (ids.min() < values[0] or ids.max() > values[1]):
        raise InvalidInput(spec.history, f"values must be {values[0]} to {values[1]}, got {ids.min()} to {ids.max()}")
