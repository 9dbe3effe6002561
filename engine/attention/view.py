"""A batch's window on the blocks: all that a layer sees of them."""

from torch import Tensor

from engine.attention.base import AttentionInputs, Backend, PackedBlocks, Rotary, Scoring
from engine.kv_pool import KVPool


class PagedView:
    """`weights`: when given, every `attend` adds its probabilities: a row's are (heads, n_r, present_length[r] + E)."""

    def __init__(
        self,
        pool: KVPool,
        inputs: AttentionInputs,
        backend: Backend,
        weights: list[list[Tensor]] | None = None,
    ) -> None:
        self.inputs = inputs
        self.backend = backend
        self.weights = weights
        self._pool = pool

    def decoder_blocks(self, x: Tensor, blocks: PackedBlocks, rotary: Rotary | None) -> Tensor | None:
        """x (T, H) through every block in one call, or None: this backend wants them one by one."""
        return self.backend.decoder_blocks(x, blocks, self._pool.k, self._pool.v, self.inputs, rotary)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, scoring: Scoring) -> Tensor:
        """Writes k and v to the layer's past, then attends over the present. Returns (T, heads * head_dim)."""
        k_blocks, v_blocks = self._pool.layers[layer]
        attended = self.backend.attend(q, k, v, k_blocks, v_blocks, self.inputs, rotary, scoring)
        if self.weights is not None:
            self.weights.append(self.backend.probabilities(q, k_blocks, self.inputs, rotary, scoring))
        return attended

    def finite(self, layer: int) -> tuple[bool, bool]:
        """Whether the keys and the values are that this batch has put into a layer's past."""
        return self.backend.finite(*self._pool.layers[layer], self.inputs.slots)
