"""Attention of one row as the textbook has it, by torch's own functions: the oracle of tests over plain tensors."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import Rotary
from engine.layers import MultiHeadAttention, RMSNorm


def random_layer(hidden_size: int, heads: int, *, seed: int = 0, **options: Any) -> MultiHeadAttention:
    """In eval mode; float32 unless compute_dtype says otherwise, with weights large enough that attention is sharp."""
    torch.manual_seed(seed)
    layer = MultiHeadAttention(hidden_size, heads, **{"compute_dtype": torch.float32, **options}).eval()
    if layer.compute_dtype == torch.float64:
        layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.4)
    return layer


def rotary_tables(channels: int, length: int, dtype: torch.dtype = torch.float32) -> Rotary:
    """For the first `channels` of a head."""
    frequencies = 100.0 ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.arange(length)[:, None] * frequencies
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def attend_in_full(
    layer: MultiHeadAttention,
    x: Tensor,
    rotary: Rotary | None = None,
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (n, H) attends to itself causally, or to all of `keys` (T, kdim) and `values` (T, vdim).

    hidden (n, T): True where a key may not be seen, besides. Returns (n, H) and the probabilities (heads, n, T + E).
    """
    causal = keys is None
    keys, values = x if keys is None else keys, x if values is None else values
    q = _heads(layer.q_proj(x), layer.heads, layer.q_norm, rotary)
    k = _heads(layer.k_proj(keys), layer.kv_heads, layer.k_norm, rotary)
    v = _heads(layer.v_proj(values), layer.kv_heads, None, None)
    seen = torch.ones(len(x), len(keys), dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if hidden is not None:
        seen &= ~hidden
    if layer.bias_k is not None and layer.bias_v is not None:
        k = torch.cat([k, layer.bias_k.view(layer.kv_heads, 1, -1)], dim=1)
        v = torch.cat([v, layer.bias_v.view(layer.kv_heads, 1, -1)], dim=1)
    if layer.zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    seen = F.pad(seen, (0, k.shape[1] - len(keys)), value=True)
    group = layer.heads // layer.kv_heads
    k, v = (torch.stack([tensor[head // group] for head in range(layer.heads)]) for tensor in (k, v))
    scores = torch.einsum("hnd,htd->hnt", q, k) / layer.head_dim**0.5
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    attended = torch.einsum("hnt,htd->nhd", probabilities, v)
    return layer.o_proj(attended.flatten(1)).detach(), probabilities.detach()


def _heads(x: Tensor, heads: int, norm: RMSNorm | None, rotary: Rotary | None) -> Tensor:
    """x (n, heads * d) -> (heads, n, d), normed and rotated by the positions 0 to n, as complex numbers."""
    x = x.view(len(x), heads, -1).transpose(0, 1)
    if norm is not None:
        x = F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    if rotary is None:
        return x
    half = rotary.cos.shape[1]
    turn = torch.complex(rotary.cos, rotary.sin)[: x.shape[1]]
    turned = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous()) * turn
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)
