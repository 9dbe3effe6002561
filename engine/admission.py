"""Whether an append may start: its inputs against the model's spec, its lengths against the session. No tensors."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from engine.batch import Append, Array, Generate, Want
from engine.blocks import blocks_for
from engine.errors import InvalidInput, LengthExceeded, Moved, WrongState
from engine.session import Session
from engine.specs import Axis, ModelSpec, TensorSpec

MAX_LABELS = 32
_NAMES = {np.dtype(name): name for name in ("int64", "float16", "float32", "uint8")}  # dtype.name takes a microsecond


class Room(NamedTuple):
    blocks: int
    block_size: int


def check_inputs(spec: ModelSpec, append: Append, batch_size: int) -> None:
    """What can be said without the session's lengths; notes the append's sizes. Raises InvalidInput naming the input.

    On the way of every step, before anything else is done with it: written so that what is right costs little.
    """
    _check_known(spec, append)
    _check_present(spec, append)
    sizes = append.sizes = _sizes(spec, append)
    for tensor in spec.inputs:
        array = append.inputs.get(tensor.name)
        if array is not None:
            _check_tensor(tensor, array, batch_size, sizes[tensor.axis])
    if spec.aligned and sizes.get("n") != sizes.get(spec.appends):
        message = f"this layer turns queries and keys by position: it needs as many of both, got {_told(sizes)}"
        raise InvalidInput(spec.inputs[0].name, message)
    if append.step:
        _check_step(spec, sizes)
    if not spec.causal and not append.step and "n" in sizes and "attention_mask" not in append.inputs:
        raise InvalidInput("attention_mask", "is required on prefill: (B, n, T), 1 = attend")
    if append.batch_valid_length is not None and len(append.batch_valid_length) != batch_size:
        raise InvalidInput("batch_valid_length", f"needs one length a row, {batch_size}")
    check_want(spec, append.want)


def check_want(spec: ModelSpec, want: Want) -> None:
    """Raises InvalidInput for an output that the model does not have, or an option out of range."""
    _check_want(spec.name, spec.output_names, spec.vocab_size, want)


@lru_cache(maxsize=1024)  # the steps of a session want the same
def _check_want(model: str, outputs: frozenset[str], vocab_size: int | None, want: Want) -> None:
    asked = {
        "logits": want.logits != "none",
        "top_logprobs": want.top_logprobs != 0,
        "token_logprobs": want.token_logprobs or want.token_top_logprobs != 0,
        "sample": want.sample is not None,
        "need_weights": want.need_weights,
    }
    gives = {"sample": "next_token", "need_weights": "attn_weights"}
    for option, on in asked.items():
        if on and gives.get(option, option) not in outputs:
            raise InvalidInput(option, f"model {model} gives {', '.join(sorted(outputs))}")
    for name, most in (("top_logprobs", want.top_logprobs), ("token_top_logprobs", want.token_top_logprobs)):
        if vocab_size is not None and not 0 <= most <= vocab_size:
            raise InvalidInput(name, f"must be 0 to {vocab_size}")
    sample = want.sample
    if sample is None:
        return
    ranges = {
        "temperature": 0 <= sample.temperature < float("inf"),
        "top_p": 0 < sample.top_p <= 1,
        "top_k": sample.top_k >= 0,
        "min_p": 0 <= sample.min_p <= 1,
        "repetition_penalty": 0 < sample.repetition_penalty < float("inf"),
    }
    for name, holds in ranges.items():
        if not holds:
            raise InvalidInput(f"sample.{name}", f"is out of range, got {getattr(sample, name)}")


def new_positions(spec: ModelSpec, append: Append, session: Session, room: Room) -> list[int]:
    """How many positions each row appends, at the session as it is now; all 0 for queries alone, which read its past.
    `room`: what the tenant may ever hold.

    Raises Moved, WrongState, InvalidInput, LengthExceeded.
    """
    check_version(append.expected_version, session)
    past = session.valid_length
    m = append.sizes.get(spec.appends, 0)
    if append.step and not all(past):
        raise WrongState("the session is empty: prefill it before the first step")
    if not m and not any(past):
        raise WrongState("the session is empty: prefill keys and values before queries alone")
    after = [length + m for length in past]
    if append.batch_valid_length is not None:
        if (append.step or not m) and append.batch_valid_length != after:
            raise Moved(
                f"batch_valid_length counts the new positions: expected {after}, got {append.batch_valid_length}",
                session.version,
                past,
            )
        after = append.batch_valid_length
    new = [stop - start for start, stop in zip(past, after, strict=True)]
    if any(not 0 <= count <= m for count in new) or (m and not any(new)):
        raise InvalidInput(
            "batch_valid_length",
            f"each must be past_length + 0 to {m} and at least one row must grow; past_length is {past}, got {after}",
        )
    given = next(tensor.name for tensor in spec.inputs if tensor.name in append.inputs)
    check_fits(given, after, session, room)
    mask = append.inputs.get("attention_mask")
    if mask is not None and mask.shape[2] != max(past) + m:
        message = f"must be (B, n, T) with T = past_length + new positions = {max(past) + m}, got {mask.shape}"
        raise InvalidInput("attention_mask", message)
    return new


def query_count(spec: ModelSpec, append: Append) -> int | None:
    """The queries of each row; None where the positions that it appends are its queries."""
    return None if spec.appends == "n" else append.sizes.get("n", 0)


def check_version(expected: int | None, session: Session) -> None:
    if expected is not None and expected != session.version:
        message = f"the session is at version {session.version}, not {expected}"
        raise Moved(message, session.version, session.valid_length)


def row_lengths(field: str, given: int | list[int], session: Session) -> list[int]:
    """One length a row, each between 0 and the row's valid length. Raises InvalidInput."""
    rows = session.valid_length
    lengths = [given] * len(rows) if isinstance(given, int) else given
    if len(lengths) != len(rows):
        raise InvalidInput(field, f"needs one length, or one a row ({len(rows)}), got {len(lengths)}")
    if any(not 0 <= length <= valid for length, valid in zip(lengths, rows, strict=True)):
        raise InvalidInput(field, f"must be 0 to the valid length {rows}, got {lengths}")
    return lengths


def prompt_positions(spec: ModelSpec, generate: Generate, session: Session, room: Room) -> list[int]:
    """How many positions a generation's prompt appends to each row, all 0 without one, once the session is cut back.

    Raises InvalidInput, WrongState, LengthExceeded.
    """
    past = session.valid_length if generate.at is None else row_lengths("at", generate.at, session)
    prompt = next(iter(generate.inputs.values()), None)
    new = 0 if prompt is None else prompt.shape[1]
    if not new and not all(past):
        raise WrongState("the session is empty: prefill it before generating")
    if new:
        check_fits(next(iter(generate.inputs)), [length + new for length in past], session, room)
    return [new] * len(past)


def check_ttl(seconds: float | None) -> None:
    """Raises InvalidInput."""
    if seconds is not None and not 0 < seconds < float("inf"):
        raise InvalidInput("ttl_seconds", f"must be positive, got {seconds}")


def merged_labels(labels: Mapping[str, str], changes: Mapping[str, str | None] | None) -> dict[str, str]:
    """The labels after a merge patch (RFC 7396): None takes one away, None in place of changes takes all away.

    Raises InvalidInput.
    """
    merged = {} if changes is None else {**labels, **changes}
    kept = {key: value for key, value in merged.items() if value is not None}
    if len(kept) > MAX_LABELS:
        raise InvalidInput("labels", f"a session has {MAX_LABELS} at most, this would make it {len(kept)}")
    return kept


def check_fits(field: str, after: list[int], session: Session, room: Room) -> None:
    """`after`: a row's length each. Raises LengthExceeded naming the field."""
    if max(after) > session.max_length:
        raise LengthExceeded(field, f"{max(after)} positions pass the session's max_length {session.max_length}")
    blocks = sum(blocks_for(length, room.block_size) for length in after)
    if blocks > room.blocks:
        raise LengthExceeded(field, f"{sum(after)} positions take {blocks} blocks and can never fit in {room.blocks}")


def _check_known(spec: ModelSpec, append: Append) -> None:
    if not append.inputs.keys() <= spec.input_names:
        name = next(name for name in append.inputs if name not in spec.input_names)
        raise InvalidInput(name, f"model {spec.name} takes {', '.join(sorted(spec.input_names))}")


def _check_present(spec: ModelSpec, append: Append) -> None:
    """Some axis is given, and of each that is, all that it requires."""
    given = {tensor.axis: tensor.name for tensor in spec.inputs if tensor.name in append.inputs}
    missing = [tensor for tensor in spec.inputs if tensor.required and tensor.name not in append.inputs]
    for tensor in missing:
        if tensor.axis in given:
            raise InvalidInput(tensor.name, f"is required with {given[tensor.axis]}")
    if not given:
        others = " and ".join(tensor.name for tensor in missing if tensor.axis != missing[0].axis)
        raise InvalidInput(missing[0].name, f"is required, or {others}" if others else "is required")


def _check_step(spec: ModelSpec, sizes: dict[Axis, int]) -> None:
    for tensor in spec.inputs:
        size = sizes.get(tensor.axis, 1)
        if size != 1:
            does = "appends 1 position" if tensor.axis == spec.appends else "asks 1 query"
            raise InvalidInput(tensor.name, f"a step {does} a row, got {size}; use prefill")
    if "n" not in sizes:
        raise InvalidInput(spec.inputs[0].name, "is required on a step; use prefill to append without asking")


def _sizes(spec: ModelSpec, append: Append) -> dict[Axis, int]:
    """n and m, as the required inputs of each axis have it; without an axis that none is given for."""
    counts: dict[Axis, list[int]] = {}
    for tensor in spec.inputs:
        if not tensor.required or tensor.name not in append.inputs:
            continue
        array = append.inputs[tensor.name]
        if array.ndim < 2:
            raise InvalidInput(tensor.name, f"must be (B, {tensor.axis}, ...), got shape {array.shape}")
        if array.shape[1] == 0:
            raise InvalidInput(tensor.name, "has 0 positions; bring at least 1")
        counts.setdefault(tensor.axis, []).append(array.shape[1])
    # Where key and value disagree, the one is meant that is as long as the query, so that the other is named.
    queries = counts.get("n", [0])[0]
    return {axis: queries if queries in found else found[0] for axis, found in counts.items()}


def _told(sizes: dict[Axis, int]) -> str:
    return ", ".join(f"{axis} = {size}" for axis, size in sizes.items())


def _check_tensor(tensor: TensorSpec, array: Array, batch_size: int, positions: int) -> None:
    name = _NAMES.get(array.dtype) or array.dtype.name
    if name not in tensor.dtypes:
        raise InvalidInput(tensor.name, f"dtype must be {' or '.join(tensor.dtypes)}, got {name}")
    expected = (batch_size, positions, *tensor.trailing)
    if array.shape != expected and not _fits(array.shape, expected):
        shape = ", ".join(str(axis) for axis in expected)
        raise InvalidInput(tensor.name, f"shape must be ({shape}), got {tuple(array.shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput(tensor.name, "has NaN or infinite values; they would stay in the session's past")
    if tensor.values is not None:
        low, high = tensor.values
        if array.size and (array.min() < low or array.max() > high):
            raise InvalidInput(tensor.name, f"values must be {low} to {high}, got {array.min()} to {array.max()}")
    if tensor.values == (0, 1) and not ((array == 0) | (array == 1)).all():
        raise InvalidInput(tensor.name, "values must be 0 (masked) or 1 (attend)")


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
    pairs = zip(expected, shape, strict=False)
    return len(shape) == len(expected) and all(isinstance(want, str) or want == got for want, got in pairs)
