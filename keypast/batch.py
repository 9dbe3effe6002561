"""Many steps in one body, for the service and the client alike: `POST /v1/batch/step` and its reply.

    JSON         {"items": [..]}, each item a step's own body with `session_id` and, if wanted, `if_match`
    safetensors  a file with the tensor `items`, uint8: that list as JSON, without the tensors; they are in the file
                 themselves, item 3's query as `3.query`

The reply has the same two forms: an item has its `status`, and the `reply` or the `problem` of the single step.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic_core import from_json, to_json

from keypast.schemas import BatchOutcome, BatchOutcomes, BatchStep, BatchSteps
from keypast.wire import (
    ARRAY_INPUTS,
    JSON_TYPE,
    SAFETENSORS_TYPE,
    AppendBody,
    Array,
    Encoded,
    Form,
    MalformedError,
    WireError,
    binary_append,
    dump_tensors,
    encode_tensor,
    is_safetensors,
    json_append,
    load_tensors,
    output_arrays,
    validated,
)

ITEMS = "items"


class Step(NamedTuple):
    """An item as read: the session that it names, if any, and its body or why it has none."""

    session_id: str | None
    body: AppendBody | WireError


class Outcome(NamedTuple):
    """As read; `arrays` are the reply's outputs."""

    told: BatchOutcome
    arrays: dict[str, Array]


class Told(NamedTuple):
    """As written: the fields of a BatchOutcome, plain and without None, since a model of each would cost as much as its
    step; `arrays` go in `form` where the reply is JSON."""

    item: dict[str, Any]
    arrays: Mapping[str, Array]
    form: Form = "base64"


def read_steps(content_type: str | None, body: bytes, limit: int) -> list[Step]:
    """The items, each read by itself. Raises WireError and its children for what is no list of 1 to `limit` items."""
    if not is_safetensors(content_type):
        return [_step(item, None) for item in _checked(validated(BatchSteps, body), limit)]
    # whether they are finite is looked at where they are admitted
    arrays, _ = load_tensors(body, finite=False)
    items = _checked(validated(BatchSteps, {ITEMS: _list_of(arrays)}), limit)
    return [_step(item, own) for item, own in zip(items, _shared_out(arrays, len(items)), strict=True)]


def write_steps(steps: Sequence[tuple[BatchStep, Mapping[str, Array]]], *, binary: bool) -> Encoded:
    """What `read_steps` reads; without arrays the body is JSON. Raises WireError: a dtype cannot travel."""
    items = [step.model_dump(exclude_unset=True, exclude_none=True, exclude=set(ARRAY_INPUTS)) for step, _ in steps]
    if binary and any(arrays for _, arrays in steps):
        return _file(items, [arrays for _, arrays in steps])
    for item, (_, arrays) in zip(items, steps, strict=True):
        item |= {name: encode_tensor(array, "base64") for name, array in arrays.items()}
    return Encoded(to_json({ITEMS: items}), JSON_TYPE, {}, {})


def write_outcomes(outcomes: Sequence[Told], *, binary: bool) -> Encoded:
    if binary:
        return _file([outcome.item for outcome in outcomes], [outcome.arrays for outcome in outcomes])
    for item, arrays, form in outcomes:
        if "reply" in item:
            item["reply"]["outputs"] |= {name: encode_tensor(array, form) for name, array in arrays.items()}
    return Encoded(to_json({ITEMS: [outcome.item for outcome in outcomes]}), JSON_TYPE, {}, {})


def read_outcomes(content_type: str | None, body: bytes) -> list[Outcome]:
    """What `write_outcomes` wrote. Raises WireError and its children."""
    if not is_safetensors(content_type):
        told = validated(BatchOutcomes, body).items
        return [Outcome(one, {} if one.reply is None else output_arrays(one.reply)) for one in told]
    arrays, _ = load_tensors(body, finite=False)
    told = validated(BatchOutcomes, {ITEMS: _list_of(arrays)}).items
    return [Outcome(one, own) for one, own in zip(told, _shared_out(arrays, len(told)), strict=True)]


def _step(item: Any, arrays: dict[str, Array] | None) -> Step:  # noqa: ANN401 - any JSON
    """`arrays`: an item's own, where they are not in it."""
    session_id = item.get("session_id") if isinstance(item, dict) else None
    try:
        if arrays is None or not isinstance(item, dict):
            body = json_append(validated(BatchStep, item))
        else:
            body = binary_append(BatchStep, item, arrays)
    except WireError as error:
        return Step(session_id if isinstance(session_id, str) else None, error)
    return Step(session_id, body)


def _checked(request: BatchSteps, limit: int) -> list[Any]:
    if len(request.items) > limit:
        raise WireError(ITEMS, f"at most {limit} steps at once, got {len(request.items)}")
    return request.items


def _file(items: list[dict[str, Any]], arrays: Sequence[Mapping[str, Array]]) -> Encoded:
    named = {f"{at}.{name}": array for at, own in enumerate(arrays) for name, array in own.items()}
    text = np.frombuffer(to_json(items), np.uint8)
    return Encoded(dump_tensors({ITEMS: text, **named}, {}), SAFETENSORS_TYPE, {}, {})


def _list_of(arrays: dict[str, Array]) -> Any:  # noqa: ANN401 - any JSON
    """Taken out of a file's tensors. Raises WireError, MalformedError."""
    text = arrays.pop(ITEMS, None)
    if text is None or text.dtype != np.uint8:
        raise WireError(ITEMS, "is required: a uint8 tensor that holds the list as JSON")
    try:
        return from_json(text.tobytes())
    except ValueError as error:
        raise MalformedError(ITEMS, f"is not JSON: {error}") from None


def _shared_out(arrays: Mapping[str, Array], count: int) -> list[dict[str, Array]]:
    """Each item's own arrays by their own names. Raises WireError for one that belongs to none."""
    numbers = {str(at): at for at in range(count)}
    own: list[dict[str, Array]] = [{} for _ in range(count)]
    for name, array in arrays.items():
        number, _, rest = name.partition(".")
        if number not in numbers:
            raise WireError(name, f"belongs to no item: it must be 0. to {count - 1}. and the name of an input")
        own[numbers[number]][rest] = array
    return own
