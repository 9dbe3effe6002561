"""The tensors behind block ids. Knows no session and decides nothing."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.specs import KVSpec
from engine.upload import to_device


class KVPool:
    """K (layers, blocks, kv_heads, head_dim, block_size) and V (layers, blocks, kv_heads, block_size, head_dim).

    On a CPU, K is laid out as it is shaped: a vector register holds one channel of many keys. Elsewhere K is laid out
    as V is, because tensor cores want a key's channels side by side: `k` is a view with its last two axes exchanged.

    Nothing is written before a session writes it: on the CPU an unused block costs address space and no memory. What a
    slot held before is never read; `zero` is there so that nothing of a deleted session is left.
    """

    def __init__(
        self, spec: KVSpec, blocks: int, block_size: int, device: str | torch.device, transposed: bool | None = None
    ) -> None:
        dtype = getattr(torch, spec.dtype)
        heads, width = spec.kv_heads, spec.head_dim
        self.kv_heads = heads
        transposed = torch.device(device).type == "cpu" if transposed is None else transposed
        inner = (width, block_size) if transposed else (block_size, width)
        k = torch.empty(spec.layers, blocks, heads, *inner, dtype=dtype, device=device)
        self.k = k if transposed else k.transpose(-1, -2)
        self.v = torch.empty(spec.layers, blocks, heads, block_size, width, dtype=dtype, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = list(zip(self.k.unbind(0), self.v.unbind(0), strict=True))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks, (from, to), in every layer."""
        if not pairs:
            return
        source, target = to_device(torch.tensor(pairs), self.k.device).unbind(1)
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]

    def zero(self, blocks: Sequence[int]) -> None:
        """Whole blocks, in every layer."""
        index = to_device(torch.tensor(blocks), self.k.device)
        self.k.index_fill_(1, index, 0)
        self.v.index_fill_(1, index, 0)

    def read(self, layer: int, tables: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's past: tables int64 (R, W), valid bool (R, T), T within W blocks -> K (R, kv_heads, head_dim, T)
        and V (R, kv_heads, T, head_dim), zero where not valid."""
        k_blocks, v_blocks = self.layers[layer]
        slots = valid.shape[1]
        k = k_blocks[tables].permute(0, 2, 3, 1, 4).flatten(3)[..., :slots]  # (R, kv_heads, head_dim, W * block_size)
        v = v_blocks[tables].permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :slots]
        return k.masked_fill(~valid[:, None, None], 0), v.masked_fill(~valid[:, None, :, None], 0)

    def write(self, layer: int, tables: Tensor, valid: Tensor, k: Tensor, v: Tensor) -> None:
        """The inverse of `read`; only blocks with a valid slot are written."""
        k_blocks, v_blocks = self.layers[layer]
        block_size = k_blocks.shape[-1]
        width, slots = tables.shape[1], valid.shape[1]
        rows, columns = valid[:, ::block_size].nonzero(as_tuple=True)
        blocks, more = tables[rows, columns], width * block_size - slots
        k = F.pad(k.to(k_blocks.dtype).masked_fill(~valid[:, None, None], 0), (0, more))
        v = F.pad(v.to(v_blocks.dtype).masked_fill(~valid[:, None, :, None], 0), (0, 0, 0, more))
        k_blocks[blocks] = k.view(*k.shape[:3], width, block_size).permute(0, 3, 1, 2, 4)[rows, columns]
        v_blocks[blocks] = v.view(*v.shape[:2], width, block_size, v.shape[3]).permute(0, 2, 1, 3, 4)[rows, columns]
