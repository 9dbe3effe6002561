"""Weights in the layouts of the CPU kernels (engine/kernels/kernels.h), so that they are read in order.

(blocks of 32 outputs, groups of 32 inputs, a group's numbers), padded with zeros. A group's numbers are, of float32 and
float16, [32 inputs][32 outputs]; of bfloat16, [16 pairs][32 outputs][2]; of 8-bit integers, with for each output and
every 32 inputs one scale as in GGUF's Q8_0, the block's bfloat16 scales, then [2 halves][16 pairs][16 outputs][2].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # inputs that share a scale
OUTPUTS = 32  # of a block
LARGEST = 127
CHUNK = 64 << 20  # bytes; what is not used of it costs address space only
ALIGNED = 64  # bytes: a line of the cache
_ROWS = 128 * OUTPUTS  # quantised at a time: what is made on the way is several times the result


class Arena:
    """Keeps weights one behind the other in large pieces of memory. The kernel gives pages of 2 MB for whole ones only,
    so that a tensor of 1 MB would lie in pages of 4 KB, and a larger one with its end: those are read a quarter
    slower."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of it, contiguous."""
        if self._used + tensor.nbytes > len(self._chunk):
            self._chunk, self._used = torch.empty(max(CHUNK, tensor.nbytes), dtype=torch.uint8), 0
        kept = self._chunk[self._used : self._used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._used += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return kept.copy_(tensor)


def pack_plain(weight: Tensor) -> Tensor:
    """weight (out, in), float32, float16 or bfloat16 -> (ceil(out / 32), ceil(in / 32), 1024) of the same numbers."""
    padded = _padded(weight)
    together = 2 if weight.dtype == torch.bfloat16 else 1
    blocks, groups = padded.shape[0] // OUTPUTS, padded.shape[1] // GROUP
    split = padded.view(blocks, OUTPUTS, groups, GROUP // together, together)
    return split.permute(0, 2, 3, 1, 4).reshape(blocks, groups, -1)


def pack_int8(weight: Tensor) -> Tensor:
    """weight (out, in), any floating dtype -> int8 (ceil(out / 32), ceil(in / 32), 1088)."""
    parts = [_pack(weight[start : start + _ROWS].float()) for start in range(0, len(weight), _ROWS)]
    return torch.cat(parts)


def unpack_int8(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """What `packed` stands for, exactly: float32 (out_features, in_features)."""
    blocks, groups, _ = packed.shape
    scales, values = packed[..., : 2 * OUTPUTS], packed[..., 2 * OUTPUTS :]
    wide = scales.contiguous().view(torch.bfloat16).float().permute(0, 2, 1).reshape(-1, groups, 1)
    rows = values.reshape(blocks, groups, 2, GROUP // 2, OUTPUTS // 2, 2).permute(0, 2, 4, 1, 3, 5)
    whole: Tensor = rows.reshape(-1, groups, GROUP).float() * wide
    return whole.flatten(1)[:out_features, :in_features].contiguous()


def _pack(weight: Tensor) -> Tensor:
    padded = _padded(weight)
    blocks, groups = padded.shape[0] // OUTPUTS, padded.shape[1] // GROUP
    grouped = padded.view(blocks, 2, OUTPUTS // 2, groups, GROUP)
    scales = _round_up(grouped.abs().amax(-1) / LARGEST)
    inverse = torch.where(scales > 0, 1 / scales.float(), 0)
    values = (grouped * inverse[..., None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    pairs = values.view(blocks, 2, OUTPUTS // 2, groups, GROUP // 2, 2).permute(0, 3, 1, 4, 2, 5)
    leading = scales.view(blocks, OUTPUTS, groups).transpose(1, 2).contiguous().view(torch.int8)
    return torch.cat([leading, pairs.reshape(blocks, groups, -1)], dim=-1)


def _padded(weight: Tensor) -> Tensor:
    out_features, in_features = weight.shape
    return F.pad(weight, (0, -in_features % GROUP, 0, -out_features % OUTPUTS))


def _round_up(scales: Tensor) -> Tensor:
    """To bfloat16 and never down, so that no value exceeds 127 steps."""
    near = scales.bfloat16()
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < scales, above, near)
