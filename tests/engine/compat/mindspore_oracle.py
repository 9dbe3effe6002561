"""MindSpore's layer again, in NumPy and float64, one row and one head at a time: nothing of it is shared with ours."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Oracle:
    """`parameters` by the original's names. Positions by explicit lengths; what no float64 needs is not rounded."""

    parameters: dict[str, Array]
    heads: int

    def first(
        self, query: Array, key: Array, value: Array, mask: Array, lengths: list[int] | None = None
    ) -> tuple[Array, Array, Array]:
        """query (B, S, H), key and value (B, T, H), mask (B, S, T), lengths of what is kept (None: all) ->
        (attn_out (B, S, H), key_present (B, N, d, T), value_present (B, N, T, d))."""
        keys, values = self._split("dense2", key), self._split("dense3", value)  # (B, N, T, d)
        out = self._attend(query, keys, values, (1.0 - mask) * -10000.0)
        for row, length in enumerate(lengths or []):
            keys[row, :, length:] = 0.0
            values[row, :, length:] = 0.0
        return out, keys.swapaxes(2, 3), values

    def step(
        self, query: Array, key: Array, value: Array, key_past: Array, value_past: Array, lengths: list[int]
    ) -> tuple[Array, Array, Array]:
        """query, key and value (B, 1, H) over the pasts, of which row b then has lengths[b] slots."""
        keys, values = key_past.swapaxes(2, 3).copy(), value_past.copy()
        bias = np.full((len(lengths), 1, keys.shape[2]), -np.inf)
        for row, length in enumerate(lengths):
            keys[row, :, length - 1] = self._split("dense2", key)[row, :, 0]
            values[row, :, length - 1] = self._split("dense3", value)[row, :, 0]
            bias[row, :, :length] = 0.0
        return self._attend(query, keys, values, bias), keys.swapaxes(2, 3), values

    def _dense(self, name: str, x: Array) -> Array:
        return x @ self.parameters[f"{name}.weight"].T + self.parameters[f"{name}.bias"]

    def _split(self, name: str, x: Array) -> Array:
        batch, length, width = x.shape
        return self._dense(name, x).reshape(batch, length, self.heads, width // self.heads).transpose(0, 2, 1, 3).copy()

    def _attend(self, query: Array, keys: Array, values: Array, bias: Array) -> Array:
        queries = self._split("dense1", query)
        merged = np.empty(query.shape)
        size = queries.shape[-1]
        for row in range(query.shape[0]):
            for head in range(self.heads):
                scores = queries[row, head] @ keys[row, head].T / np.sqrt(size) + bias[row]
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                merged[row, :, head * size : (head + 1) * size] = weights @ values[row, head]
        return merged @ self.parameters["projection.weight"] + self.parameters["projection.bias"]
