"""The slow truth: attention over gathered blocks, row by row, in float32. Every other backend is tested against it, and
it serves where none of them can run."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionInputs, PackedBlocks, Rotary, Scoring
from engine.attention.mask import dense_mask
from engine.attention.softmax import probabilities, with_extra


class SdpaBackend:
    name = "sdpa"
    recordable = False

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_blocks: Tensor,
        v_blocks: Tensor,
        inputs: AttentionInputs,
        rotary: Rotary | None,
        scoring: Scoring,
    ) -> Tensor:
        if rotary is not None and q.shape[0] != k.shape[0]:
            raise ValueError(f"rotary needs a position for each new key: S must be T, not {k.shape[0]}, {q.shape[0]}")
        q, k = rotate(q, rotary, inputs.positions), rotate(k, rotary, inputs.positions)
        write(k, v, k_blocks, v_blocks, inputs.slots)
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)  # positions of no row stay zeros
        for row, queries in _rows(inputs):
            heads = q[queries].transpose(0, 1).float()  # (heads, n, d)
            keys, values = _gather_keys(k_blocks, inputs, row), _gather_values(v_blocks, inputs, row)
            keys, values, bias = with_extra(keys, values, dense_mask(inputs, row), scoring)
            group = q.shape[1] // keys.shape[0]
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            if scoring.softmax_dtype == torch.float32 and not scoring.dropout:
                attended = F.scaled_dot_product_attention(
                    heads, keys.transpose(1, 2), values, attn_mask=bias, scale=scoring.scale
                ).nan_to_num(0.0)
            else:
                weights = probabilities(heads, keys, bias, scoring).float()
                attended = F.dropout(weights, scoring.dropout) @ values
            out[queries] = attended.transpose(0, 1)
        return out.flatten(1).to(v.dtype)

    def finite(self, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> tuple[bool, bool]:
        block_size = v_blocks.shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        keys, values = k_blocks[blocks, :, :, offsets], v_blocks[blocks, :, offsets]
        return bool(torch.isfinite(keys).all()), bool(torch.isfinite(values).all())

    def probabilities(
        self, q: Tensor, k_blocks: Tensor, inputs: AttentionInputs, rotary: Rotary | None, scoring: Scoring
    ) -> list[Tensor]:
        q = rotate(q, rotary, inputs.positions)
        rows = []
        for row, queries in _rows(inputs):
            heads = q[queries].transpose(0, 1).float()  # (heads, n, d)
            keys = _gather_keys(k_blocks, inputs, row)
            keys, _, bias = with_extra(keys, None, dense_mask(inputs, row), scoring)
            keys = keys.repeat_interleave(heads.shape[0] // keys.shape[0], 0)
            rows.append(probabilities(heads, keys, bias, scoring))
        return rows

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        wide = _wide(total)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * weight.to(wide.dtype)).to(x.dtype), total

    def silu_gate(self, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(x.dtype)

    def decoder_blocks(
        self, x: Tensor, blocks: PackedBlocks, k: Tensor, v: Tensor, inputs: AttentionInputs, rotary: Rotary | None
    ) -> Tensor | None:
        return None


def rotate(x: Tensor, rotary: Rotary | None, positions: Tensor) -> Tensor:
    """x (..., heads, d) with its first channels rotated by `positions` (...): float32 or wider; without tables, x."""
    if rotary is None:
        return x
    half = rotary.cos.shape[1]
    cos, sin = rotary.cos[positions].unsqueeze(-2), rotary.sin[positions].unsqueeze(-2)  # (..., 1, half)
    first, second, rest = torch.split(_wide(x), [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def write(k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> None:
    """Rounds k and v (S, kv_heads, d) to the past's dtype and puts them into their slots."""
    block_size = v_blocks.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    k_blocks[blocks, :, :, offsets] = k.to(k_blocks.dtype)
    v_blocks[blocks, :, offsets] = v.to(v_blocks.dtype)


def _rows(inputs: AttentionInputs) -> Iterator[tuple[int, slice]]:
    bounds = inputs.query_start.tolist()
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield row, slice(start, stop)


def _table(inputs: AttentionInputs, row: int, block_size: int) -> tuple[Tensor, int]:
    present = int(inputs.present_length[row])
    return inputs.block_table[row, : -(-present // block_size)].long(), present


def _gather_keys(k_blocks: Tensor, inputs: AttentionInputs, row: int) -> Tensor:
    """The row's keys, float32 (kv_heads, d, present_length)."""
    table, present = _table(inputs, row, k_blocks.shape[3])
    return k_blocks[table].permute(1, 2, 0, 3).flatten(2)[..., :present].float()


def _gather_values(v_blocks: Tensor, inputs: AttentionInputs, row: int) -> Tensor:
    """The row's values, float32 (kv_heads, present_length, d)."""
    table, present = _table(inputs, row, v_blocks.shape[2])
    return v_blocks[table].permute(1, 0, 2, 3).flatten(1, 2)[:, :present].float()
