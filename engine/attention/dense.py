"""The past as plain tensors, in MindSpore's layout: the stateless call, training, and steps of fixed shape.

    query (B, n, H), key and value (B, m, H)  ->  Past: key (B, kv_heads, d, T), value (B, kv_heads, T, d), length (B,)

Everything here can be differentiated, compiled without a graph break and captured in a CUDA graph: shapes depend on
shapes only, and no value is read on the host.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import Rotary, Scoring
from engine.attention.mask import dense_bias
from engine.attention.sdpa import SdpaBackend, rotate
from engine.attention.softmax import probabilities, with_extra
from engine.errors import InvalidInput, LengthExceeded


class Past(NamedTuple):
    """`key` (B, kv_heads, d, T), `value` (B, kv_heads, T, d); slots [0, length[b]) of row b are valid (int, (B,)).

    Slots beyond may hold anything, NaN too: they are never read.
    """

    key: Tensor
    value: Tensor
    length: Tensor


def check_shapes(
    widths: tuple[int, int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: Past | None,
    valid_length: Tensor | None,
) -> None:
    """(B, n, width), (B, m, width), (B, m, width). Raises InvalidInput that names what does not fit; reads no value."""
    for name, tensor, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
        if tensor.dim() != 3 or (tensor.shape[0], tensor.shape[2]) != (query.shape[0], width):
            raise InvalidInput(name, f"must be (B, n, {width}) with the query's B, got {tuple(tensor.shape)}")
    batch, m = query.shape[0], key.shape[1]
    if value.shape[1] != m:
        raise InvalidInput("value", f"must have the key's {m} positions, got {value.shape[1]}")
    if m == 0 and past is None:
        raise InvalidInput("key", "a query alone reads a past: give a key, or a past")
    if valid_length is not None and (valid_length.shape != (batch,) or valid_length.is_floating_point()):
        found = f"{tuple(valid_length.shape)} {valid_length.dtype}"
        raise InvalidInput("batch_valid_length", f"must be ({batch},) int, got {found}")


def check_past(past: Past, batch: int, kv_heads: int, head_dim: int) -> None:
    """Raises InvalidInput for a past of another shape; reads no value."""
    slots = past.key.shape[-1] if past.key.dim() == 4 else 1
    for name, tensor, shape in (
        ("key (B, kv_heads, d, T)", past.key, (batch, kv_heads, head_dim, slots)),
        ("value (B, kv_heads, T, d)", past.value, (batch, kv_heads, slots, head_dim)),
        ("length (B,)", past.length, (batch,)),
    ):
        if tensor.shape != shape:
            raise InvalidInput("past", f"its {name} must be {shape}, got {tuple(tensor.shape)}")
    if slots == 0 or past.length.is_floating_point():
        raise InvalidInput("past", f"needs a slot or more and int lengths, has {slots} and {past.length.dtype}")


def check_rotary(rotary: Rotary, n: int, m: int, slots: int) -> None:
    """n queries and m keys, of which any may come to stand in the last slot. Raises InvalidInput."""
    table = rotary.cos.shape[0]
    if n > m:
        raise InvalidInput("rotary", f"a query's position is that of its key: {n} queries, but {m} keys")
    if slots > table:
        raise InvalidInput("rotary", f"its tables end at {table} positions, and {slots} may be reached")


def check_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    """`shape`: (B, heads, n, T). Raises InvalidInput; reads no value. An axis may be 1, which serves all of it."""
    batch, _, n, keys = shape
    wanted = (batch, n, keys) if mask.dim() == 3 else shape
    if len(wanted) != mask.dim() or any(size not in (1, want) for size, want in zip(mask.shape, wanted, strict=True)):
        forms = f"(B, n, T) or (B, heads, n, T), that is {(batch, n, keys)} or {shape}"
        raise InvalidInput("attention_mask", f"must be {forms}, got {tuple(mask.shape)}")


def check_lengths(past: Past | None, m: int, valid_length: Tensor | None) -> None:
    """Reads lengths on the host, but not in a compiled call. Raises LengthExceeded for a present that the slots do not
    hold, InvalidInput for a `valid_length` (B,) that is not past length + 0 to m."""
    if torch.compiler.is_compiling() or (past is None and valid_length is None):
        return
    room = m if past is None else past.key.shape[-1]
    after = None if valid_length is None else valid_length.tolist()
    before = [0] * len(after or []) if past is None else past.length.tolist()
    after = [length + m for length in before] if after is None else after
    if any(not 0 <= now - then <= m for now, then in zip(after, before, strict=True)):
        raise InvalidInput("batch_valid_length", f"each must be past length + 0 to {m}; that is {before}, got {after}")
    if max(after, default=0) > room:
        raise LengthExceeded("batch_valid_length", f"{max(after)} positions pass the past's {room} slots")


class DenseView:
    """A KVView over one layer's plain tensors, for one call. Afterwards `present` and, if wanted, `weights` are there.

    bias: added to scores, broadcasting to (B, heads, n, T): T slots of the past, or m keys without one.
    past: what is there; k and v are put behind its length, row b growing by new[b] (default: all m). Without a past the
        m keys are the whole present, all of them seen unless `bias` hides them, and `new` only says what is kept.
    causal: query i sees keys [0, past length + i]; else every valid one.
    in_place: the past's own tensors are written, `length` too, and are the present: buffers that stay where they are.
        No gradient flows through them. A position beyond the last slot is dropped and not counted.
    """

    def __init__(
        self,
        *,
        bias: Tensor | None = None,
        past: Past | None = None,
        new: Tensor | None = None,
        causal: bool = False,
        in_place: bool = False,
        need_weights: bool = False,
    ) -> None:
        self.backend = SdpaBackend()
        self.present: Past | None = None
        self.weights: Tensor | None = None  # (B, heads, n, T + E), after dropout
        self._bias, self._past, self._new = bias, past, new
        self._causal, self._in_place, self._need_weights = causal, in_place, need_weights

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, scoring: Scoring) -> Tensor:
        """q (B, n, heads, d), k and v (B, m, kv_heads, d) -> (B, n, heads * d)."""
        batch, n, heads, _ = q.shape
        dtype, m = q.dtype, k.shape[1]
        past = self._past
        start = torch.zeros(batch, dtype=torch.long, device=q.device) if past is None else past.length.long()
        positions = start[:, None] + torch.arange(max(n, m), device=q.device)
        if rotary is not None:  # padding and dropped positions may lie beyond the tables
            angles = positions.clamp(max=rotary.cos.shape[0] - 1)
            q, k = rotate(q, rotary, angles[:, :n]).to(dtype), rotate(k, rotary, angles[:, :m]).to(dtype)
        keys, values, length = self._write(k.permute(0, 2, 3, 1), v.transpose(1, 2), start)
        bias = dense_bias(self._bias, length, positions[:, :n] if self._causal else None, keys.shape[-1])
        wide = torch.promote_types(dtype, torch.float32)
        keys, values, bias = with_extra(keys.to(wide), values.to(wide), bias, scoring)
        group = heads // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        weights = _drop(probabilities(q.transpose(1, 2).to(wide), keys, bias, scoring), scoring)
        if self._need_weights:
            self.weights = weights
        return (weights.to(dtype).to(wide) @ values).transpose(1, 2).flatten(2).to(dtype)

    def _write(self, k: Tensor, v: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """k (B, kv_heads, d, m), v (B, kv_heads, m, d). What is attended, and how much of it is valid (None: all)."""
        m, past = k.shape[-1], self._past
        offsets = torch.arange(m, device=k.device)
        new = torch.full_like(start, m) if self._new is None else self._new.to(start).clamp(0, m)
        fresh = offsets < new[:, None]  # (B, m)
        if past is None:
            self.present = Past(*_zeroed_beyond(new, k, v), new)
            return k, v, None
        room = past.key.shape[-1]
        if m > room:
            raise LengthExceeded("key", f"{m} positions pass the past's {room} slots")
        # A padded position puts back what is there, and so does one past the end: no slot is written twice.
        at = start[:, None] + offsets
        fresh = fresh & (at < room)
        if self._in_place:
            k, v = k.detach(), v.detach()
        key = _put(past.key, 3, at % room, k, fresh[:, None, None, :], self._in_place)
        value = _put(past.value, 2, at % room, v, fresh[:, None, :, None], self._in_place)
        length = (start + new).clamp(max=room)
        # What lies beyond must not be read, not even times zero: it may be NaN.
        attended = _zeroed_beyond(length, key, value)
        if self._in_place:
            past.length.copy_(length)
            self.present = past
        else:
            self.present = Past(*attended, length.to(past.length.dtype))
        return *attended, length


def _zeroed_beyond(length: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key (B, kv_heads, d, T) and value (B, kv_heads, T, d) with zeros in slots [length[b], T)."""
    beyond = torch.arange(key.shape[-1], device=key.device) >= length[:, None]  # (B, T)
    return key.masked_fill(beyond[:, None, None, :], 0.0), value.masked_fill(beyond[:, None, :, None], 0.0)


def _drop(weights: Tensor, scoring: Scoring) -> Tensor:
    """Where a layer is cut, each rank draws for all heads and takes its own: ranks seeded alike drop as one would."""
    ranks = scoring.ranks
    if ranks is None or not scoring.dropout:
        return F.dropout(weights, scoring.dropout)
    batch, heads, *rest = weights.shape
    kept = F.dropout(weights.new_ones(batch, heads * ranks.size, *rest), scoring.dropout)
    return weights * ranks.share(kept, 1)


def _put(into: Tensor, axis: int, at: Tensor, fresh: Tensor, wanted: Tensor, in_place: bool) -> Tensor:
    """`fresh` written to slots `at` (B, m) of the axis where it is `wanted`; in a copy unless `in_place`."""
    shape = [1, 1, 1, 1]
    shape[0], shape[axis] = at.shape
    index = at.view(shape).expand(fresh.shape)
    merged = torch.where(wanted, fresh.to(into.dtype), into.gather(axis, index))
    return into.scatter_(axis, index, merged) if in_place else into.scatter(axis, index, merged)
