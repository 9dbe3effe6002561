"""The tensors behind block ids. Knows no session and decides nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.specs import KVSpec


class KVPool:
    """K (layers, blocks, kv_heads, head_dim, block_size) and V (layers, blocks, kv_heads, block_size, head_dim).

    Nothing is written before a session writes it: on the CPU an unused block costs address space and no memory. What a
    slot held before is never read, so it need not be zero.
    """

    def __init__(self, spec: KVSpec, blocks: int, block_size: int, device: str | torch.device) -> None:
        dtype = getattr(torch, spec.dtype)
        heads, width = spec.kv_heads, spec.head_dim
        self.k = torch.empty(spec.layers, blocks, heads, width, block_size, dtype=dtype, device=device)
        self.v = torch.empty(spec.layers, blocks, heads, block_size, width, dtype=dtype, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = list(zip(self.k.unbind(0), self.v.unbind(0), strict=True))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks, (from, to), in every layer."""
        if not pairs:
            return
        source, target = torch.tensor(pairs, device=self.k.device).unbind(1)
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]
