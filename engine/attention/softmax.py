"""From scores to probabilities, written once: for the slow truth, for `need_weights`, for pasts of plain tensors.

All of it can be differentiated and compiled; T is the number of keys, n of queries, and leading axes broadcast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import Scoring


def probabilities(q: Tensor, keys: Tensor, bias: Tensor | None, scoring: Scoring) -> Tensor:
    """q (..., n, d), keys (..., d, T), bias broadcasting to (..., n, T) -> (..., n, T) in `scoring.softmax_dtype`.

    q is scaled before the product, which is summed in q's dtype: in float32 at least, nothing overflows.
    A query whose every key has bias -inf gets zeros, and so do its gradients.
    """
    scores = ((q * scoring.scale) @ keys).to(scoring.softmax_dtype)
    if bias is None or scores.shape[-1] == 0:
        return torch.softmax(scores, dim=-1)
    scores = scores + bias.to(scoring.softmax_dtype)
    blind = scores.detach().amax(dim=-1, keepdim=True) == -torch.inf
    return torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)


def with_extra(
    keys: Tensor, values: Tensor | None, bias: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor | None]:
    """keys (..., kv_heads, d, T), values (..., kv_heads, T, d) and bias (..., T) and the layer's own keys."""
    values = keys.transpose(-1, -2) if values is None else values
    if scoring.extra_k is None or scoring.extra_v is None:
        return keys, values, bias
    extra_k = scoring.extra_k.permute(1, 2, 0).to(keys.dtype).expand(*keys.shape[:-1], -1)
    extra_v = scoring.extra_v.transpose(0, 1).to(values.dtype).expand(*values.shape[:-2], -1, -1)
    keys, values = torch.cat([keys, extra_k], dim=-1), torch.cat([values, extra_v], dim=-2)
    return keys, values, None if bias is None else F.pad(bias, (0, scoring.extra_k.shape[0]))
