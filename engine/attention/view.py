"""A batch's window on the past: all that a layer sees of it."""

from collections.abc import Sequence

from torch import Tensor

from engine.attention.base import AttentionInputs, Backend, Rotary
from engine.attention.sdpa import probabilities


class KVView:
    """`weights`: when given, every `attend` adds its probabilities, a list of (heads, n_r, present_length[r]) a row."""

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        inputs: AttentionInputs,
        backend: Backend,
        weights: list[list[Tensor]] | None = None,
    ) -> None:
        self.inputs = inputs
        self.backend = backend
        self.weights = weights
        self._layers = layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, scale: float) -> Tensor:
        """Writes k and v to the layer's past, then attends over the present. Returns (T, heads * head_dim)."""
        k_blocks, v_blocks = self._layers[layer]
        attended = self.backend.attend(q, k, v, k_blocks, v_blocks, self.inputs, rotary, scale)
        if self.weights is not None:
            self.weights.append(probabilities(q, k_blocks, self.inputs, rotary, scale))
        return attended
