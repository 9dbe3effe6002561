"""The only place where masks meet: the caller's, causality and the valid length.

A caller's mask is (n, T), 1 = attend, column j the key at absolute position j of the row. Where `causal` is off and a
row has no mask, every valid position is seen (a step). Masked means -inf: a masked key gets probability exactly 0, and
a query whose every key is masked gives zeros; `additive` alone, for callers from MindSpore, is finite.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.attention.base import AttentionInputs
from engine.batch import Array


def ragged_bias(
    masks: Sequence[Array | None], counts: Sequence[int], present: Sequence[int]
) -> tuple[Array, Array] | None:
    """The rows' masks as (bias, bias_start) of AttentionInputs, or None if no row has one."""
    if all(mask is None for mask in masks):
        return None
    start = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum([count * length for count, length in zip(counts, present, strict=True)], out=start[1:])
    bias = np.zeros(start[-1], dtype=np.float32)
    for row, mask in enumerate(masks):
        if mask is not None:
            part = mask[: counts[row], : present[row]]
            bias[start[row] : start[row + 1]] = np.where(part != 0, 0.0, -np.inf).ravel()
    return bias, start


def attending(mask: Tensor) -> Tensor:
    """Ours: 1 or True = attend. What is added to scores, float32: 0 where a key is seen, -inf where it is not."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask == 0, -torch.inf)


def hiding(mask: Tensor) -> Tensor:
    """torch's: True = may not attend, and floats are added as they are. What is added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -torch.inf)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """MindSpore's: a number, 1 = attend. What is added to scores, in the softmax's `dtype`: (1 - mask) * -10000.

    So 0.5 adds -5000, and a query whose every key is masked weighs them by their unmasked scores, as `dtype` rounds
    them at -10000."""
    return (1 - mask.to(dtype)) * -10000.0


def dense_bias(bias: Tensor | None, length: Tensor | None, positions: Tensor | None, keys: int) -> Tensor | None:
    """What is added to scores over plain tensors, (B or 1, heads or 1, n or 1, keys): `bias`, and -inf for keys at or
    beyond their row's `length` (B,), and for keys behind the query's own place where `positions` (B, n) are given."""
    hidden = None
    if length is not None:
        hidden = (torch.arange(keys, device=length.device) >= length[:, None])[:, None, None, :]
    if positions is not None:
        ahead = (torch.arange(keys, device=positions.device) > positions[:, :, None])[:, None]
        hidden = ahead if hidden is None else hidden | ahead
    if hidden is None:
        return bias
    if bias is None:
        bias = torch.zeros((), device=hidden.device)
    return torch.where(hidden, -torch.inf, bias)


def dense_mask(inputs: AttentionInputs, row: int) -> Tensor:
    """What the row adds to its scores: float32 (n_r, present_length[r]), 0 where a key is seen as it is."""
    start, stop = int(inputs.query_start[row]), int(inputs.query_start[row + 1])
    past, present = int(inputs.past_length[row]), int(inputs.present_length[row])
    mask = torch.zeros(stop - start, present)
    if inputs.causal:
        positions = torch.arange(past, past + stop - start)
        mask.masked_fill_(torch.arange(present) > positions[:, None], -torch.inf)
    if inputs.bias is not None and inputs.bias_start is not None:
        first, last = int(inputs.bias_start[row]), int(inputs.bias_start[row + 1])
        mask += inputs.bias[first:last].view_as(mask).cpu()
    return mask.to(inputs.query_start.device)
