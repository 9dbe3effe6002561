"""From the chunks of rows to the outputs of an append: joined along positions, padded over rows, stacked."""

from typing import Any

import numpy as np

from engine.batch import Array, RowResult, Work, concat


def gather(work: Work) -> dict[str, Any]:
    """Outputs by name. What a row gives per position becomes (B, n, ...), zero where a row is shorter; arrays that it
    gives once are padded to the largest and stacked; anything else is a list with None for a row that gave nothing."""
    outputs: dict[str, Any] = dict(work.outputs)
    if len(work.results) == 1 == len(work.results[0]):  # a step of one row
        only = work.results[0][0]
        outputs |= {name: value[np.newaxis] for name, value in only.positions.items()}
        return outputs | {name: _as_row(value) for name, value in only.once.items()}
    for name in _names(work, "positions"):
        rows = [[chunk.positions[name] for chunk in chunks] for chunks in work.results]
        outputs[name] = stack_padded([concat(chunks) if chunks else None for chunks in rows])
    for name in _names(work, "once"):
        values = [next((chunk.once[name] for chunk in chunks if name in chunk.once), None) for chunks in work.results]
        outputs[name] = stack_padded(values) if any(isinstance(value, np.ndarray) for value in values) else values
    return outputs


def _as_row(value: Any) -> Any:  # noqa: ANN401 - what a model gives
    return value[np.newaxis] if isinstance(value, np.ndarray) else [value]


def stack_padded(arrays: list[Array | None]) -> Array:
    """Arrays of one rank and dtype -> one array with a leading axis, zeros where an array is smaller or None."""
    given = [array for array in arrays if array is not None]
    if len(given) == 1 == len(arrays):
        return given[0][np.newaxis]
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in given), strict=True))
    stacked = np.zeros((len(arrays), *shape), dtype=given[0].dtype)
    for index, array in enumerate(arrays):
        if array is not None:
            stacked[index][tuple(slice(size) for size in array.shape)] = array
    return stacked


def _names(work: Work, part: str) -> list[str]:
    results: list[RowResult] = [chunk for chunks in work.results for chunk in chunks]
    return list(dict.fromkeys(name for chunk in results for name in getattr(chunk, part)))
