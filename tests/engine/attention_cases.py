"""Ragged batches over scattered blocks, made concrete, and the attention contract in float64 to hold a backend to."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from engine.attention.base import AttentionInputs, Backend, Rotary, Scoring


@dataclass(frozen=True)
class Case:
    """A ragged batch: row r has `past[r]` positions behind it, appends `keys[r]` and brings `new[r]` queries."""

    past: tuple[int, ...]
    new: tuple[int, ...]
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32
    causal: bool = True
    rotary_dim: int = 0
    biased: bool = False
    keys: tuple[int, ...] | None = None  # `new` unless given
    extras: int = 0
    seed: int = 0


@dataclass
class World:
    """A case made concrete: every tensor that `attend` takes. Slots that hold nothing are NaN."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    k_blocks: Tensor
    v_blocks: Tensor
    inputs: AttentionInputs
    rotary: Rotary | None
    scoring: Scoring

    def attend(self, backend: Backend) -> Tensor:
        """Runs on copies of the pools, so that a world can be run again."""
        return self.run(backend)[0]

    def run(self, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the pools as they are afterwards."""
        pools = self.k_blocks.clone(), self.v_blocks.clone()
        return backend.attend(self.q, self.k, self.v, *pools, self.inputs, self.rotary, self.scoring), *pools

    def to(self, device: str) -> "World":
        """The same on another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device)
            elif isinstance(value, (AttentionInputs, Rotary, Scoring)):
                tensors = {each.name: getattr(value, each.name) for each in fields(value)}
                tensors = {name: each.to(device) for name, each in tensors.items() if isinstance(each, Tensor)}
                moved[field.name] = replace(value, **tensors)
        return replace(self, **moved)


def make(case: Case) -> World:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, size, keys = len(case.past), case.block_size, case.new if case.keys is None else case.keys
    present = [p + m for p, m in zip(case.past, keys, strict=True)]
    needs = [-(-length // size) for length in present]
    blocks, queries, written = sum(needs) + 3, sum(case.new), sum(keys)
    order = (torch.randperm(blocks - 1, generator=generator) + 1).tolist()
    table = torch.zeros(rows, max([1, *needs]), dtype=torch.int32)
    k_blocks = torch.full((blocks, case.kv_heads, case.head_dim, size), torch.nan).to(case.cache_dtype)
    v_blocks = torch.full((blocks, case.kv_heads, size, case.head_dim), torch.nan).to(case.cache_dtype)
    slots, positions = [], [p + i for p, n in zip(case.past, case.new, strict=True) for i in range(n)]
    for r in range(rows):
        own = [order.pop() for _ in range(needs[r])]
        table[r, : needs[r]] = torch.tensor(own, dtype=torch.int32)
        for position in range(present[r]):
            block, offset = own[position // size], position % size
            if position < case.past[r]:
                k_blocks[block, :, :, offset] = normal(case.kv_heads, case.head_dim).to(case.cache_dtype)
                v_blocks[block, :, offset] = normal(case.kv_heads, case.head_dim).to(case.cache_dtype)
            else:
                slots.append(block * size + offset)
    # One wide tensor, as a fused projection gives it: q, k and v are strided views.
    qkv = normal(max(queries, written), case.heads + 2 * case.kv_heads, case.head_dim).to(case.dtype)
    q, k, v = torch.split(qkv, [case.heads, case.kv_heads, case.kv_heads], dim=1)
    q, k, v = q[:queries], k[:written], v[:written]
    bias, bias_start = None, None
    if case.biased:
        sizes = torch.tensor([n * length for n, length in zip(case.new, present, strict=True)])
        bias_start = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        bias = normal(int(sizes.sum()))
        bias[torch.rand(bias.shape, generator=generator) < 0.3] = -torch.inf
        if case.new[0]:
            bias[: present[0]] = -torch.inf  # the first query sees nothing
    rotary = None
    if case.rotary_dim:
        angles = normal(max([1, *present]), case.rotary_dim // 2) * 3
        rotary = Rotary(angles.cos(), angles.sin())
    starts = [sum(case.new[:r]) for r in range(rows + 1)]
    inputs = AttentionInputs(
        query_start=torch.tensor(starts, dtype=torch.int32),
        past_length=torch.tensor(case.past, dtype=torch.int32),
        present_length=torch.tensor(present, dtype=torch.int32),
        block_table=table,
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        causal=case.causal,
        bias=bias,
        bias_start=bias_start,
    )
    extra_k, extra_v = None, None
    if case.extras:
        extra_k, extra_v = normal(2, case.extras, case.kv_heads, case.head_dim)
    scoring = Scoring(case.head_dim**-0.5, extra_k, extra_v)
    return World(case, q, k, v, k_blocks, v_blocks, inputs, rotary, scoring)


def rotated(x: Tensor, positions: Tensor, rotary: Rotary | None) -> Tensor:
    """(T, heads, head_dim) in float32, as the contract says it."""
    x = x.float()
    if rotary is None:
        return x
    cos, sin = rotary.cos[positions][:, None], rotary.sin[positions][:, None]
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def reference(w: World) -> Tensor:
    """The contract in float64, one query at a time. (T, heads * head_dim)"""
    inputs, size = w.inputs, w.case.block_size
    cache = w.case.cache_dtype
    k_blocks, v_blocks = w.k_blocks.double(), w.v_blocks.double()
    k, v = rotated(w.k, inputs.positions, w.rotary).to(cache).double(), w.v.to(cache).double()
    for t, slot in enumerate(inputs.slots.tolist()):
        k_blocks[slot // size, :, :, slot % size] = k[t]
        v_blocks[slot // size, :, slot % size] = v[t]
    q = rotated(w.q, inputs.positions, w.rotary).double()
    out = torch.zeros(q.shape, dtype=torch.float64)
    for r in range(len(inputs.past_length)):
        start, end = inputs.query_start[r : r + 2].tolist()
        past, present = int(inputs.past_length[r]), int(inputs.present_length[r])
        own = inputs.block_table[r].long()
        keys = k_blocks[own].permute(1, 2, 0, 3).flatten(2)[:, :, :present]
        values = v_blocks[own].transpose(0, 1).flatten(1, 2)[:, :present]
        keys = keys.repeat_interleave(w.case.heads // w.case.kv_heads, dim=0)
        values = values.repeat_interleave(w.case.heads // w.case.kv_heads, dim=0)
        limits = past + torch.arange(end - start)[:, None] if inputs.causal else torch.full((end - start, 1), present)
        scores = (q[start:end].transpose(0, 1) @ keys) * w.scoring.scale  # (heads, n, present)
        seen = torch.arange(present) <= limits
        if inputs.bias is not None and inputs.bias_start is not None:
            first, last = inputs.bias_start[r : r + 2].tolist()
            bias = inputs.bias[first:last].view(end - start, present).double()
            scores, seen = scores + bias, seen & (bias > -torch.inf)
        scores = scores.masked_fill(~seen, -torch.inf)
        if w.scoring.extra_k is not None and w.scoring.extra_v is not None:
            group = w.case.heads // w.case.kv_heads
            extra_k, extra_v = (x.double().repeat_interleave(group, 1) for x in (w.scoring.extra_k, w.scoring.extra_v))
            own = torch.einsum("nhd,ehd->hne", q[start:end], extra_k) * w.scoring.scale
            scores, values = torch.cat([scores, own], -1), torch.cat([values, extra_v.transpose(0, 1)], 1)
        weights = scores.softmax(-1).nan_to_num()  # nothing seen: 0 / 0
        out[start:end] = (weights @ values).transpose(0, 1)
    return out.flatten(1)
