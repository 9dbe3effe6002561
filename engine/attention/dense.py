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
    """`key` (B, kv_heads, d, T), `value` (B, kv_heads, T, d); slots [0, length[b]) of row b are valid (int, (B,))."""

    key: Tensor
    value: Tensor
    length: Tensor


def check_lengths(past: Past, m: int, valid_length: Tensor | None) -> None:
    """Reads lengths on the host. Raises LengthExceeded for a present that the slots do not hold, InvalidInput for a
    `valid_length` (B,) that is not past length + 0 to m."""
    if torch.compiler.is_compiling():
        return
    room, before = past.key.shape[-1], past.length.tolist()
    after = [length + m for length in before] if valid_length is None else valid_length.tolist()
    if any(not 0 <= now - then <= m for now, then in zip(after, before, strict=True)):
        raise InvalidInput("batch_valid_length", f"each must be past length + 0 to {m}; that is {before}, got {after}")
    if max(after) > room:
        raise LengthExceeded("batch_valid_length", f"{max(after)} positions pass the past's {room} slots")


class DenseView:
    """A KVView over one layer's plain tensors, for one call. Afterwards `present` and, if wanted, `weights` are there.

    bias: added to scores, broadcasting to (B, heads, n, T): T slots of the past, or m keys without one.
    past: what is there; k and v are put behind its length, row b growing by new[b] (default: all m). Without a past the
        m keys are the whole present, all of them seen unless `bias` hides them, and `new` only says what is kept.
    causal: query i sees keys [0, past length + i]; else every valid one.
    in_place: the past's own tensors are written, for buffers that stay where they are; no gradient flows through them.
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
        self.weights: Tensor | None = None  # (B, heads, n, T + E)
        self._bias, self._past, self._new = bias, past, new
        self._causal, self._in_place, self._need_weights = causal, in_place, need_weights

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, scoring: Scoring) -> Tensor:
        """q (B, n, heads, d), k and v (B, m, kv_heads, d) -> (B, n, heads * d)."""
        batch, n, heads, _ = q.shape
        dtype, m = q.dtype, k.shape[1]
        start = (
            torch.zeros(batch, dtype=torch.long, device=q.device) if self._past is None else self._past.length.long()
        )
        positions = start[:, None] + torch.arange(max(n, m), device=q.device)
        q, k = rotate(q, rotary, positions[:, :n]).to(dtype), rotate(k, rotary, positions[:, :m]).to(dtype)
        keys, values, length = self._write(k.permute(0, 2, 3, 1), v.transpose(1, 2), start)
        bias = dense_bias(self._bias, length, positions[:, :n] if self._causal else None, keys.shape[-1])
        wide = torch.promote_types(dtype, torch.float32)
        keys, values, bias = with_extra(keys.to(wide), values.to(wide), bias, scoring)
        group = heads // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        weights = probabilities(q.transpose(1, 2).to(wide), keys, bias, scoring)
        if self._need_weights:
            self.weights = weights
        weights = F.dropout(weights.to(dtype), scoring.dropout).to(wide)
        return (weights @ values).transpose(1, 2).flatten(2).to(dtype)

    def _write(self, k: Tensor, v: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """k (B, kv_heads, d, m), v (B, kv_heads, m, d). What is attended, and how much of it is valid (None: all)."""
        m = k.shape[-1]
        offsets = torch.arange(m, device=k.device)
        new = torch.full_like(start, m) if self._new is None else self._new.to(start)
        fresh = offsets < new[:, None]  # (B, m)
        if self._past is None:
            kept = k.masked_fill(~fresh[:, None, None, :], 0.0), v.masked_fill(~fresh[:, None, :, None], 0.0)
            self.present = Past(*kept, new)
            return k, v, None
        room = self._past.key.shape[-1]
        if m > room:
            raise LengthExceeded("key", f"{m} positions pass the past's {room} slots")
        # A padded position puts back what is there, and so does one past the end: no slot is written twice.
        at = start[:, None] + offsets
        fresh = fresh & (at < room)
        key = _put(self._past.key, 3, at % room, k, fresh[:, None, None, :], self._in_place)
        value = _put(self._past.value, 2, at % room, v, fresh[:, None, :, None], self._in_place)
        self.present = Past(key, value, start + new)
        return key, value, start + new


def _put(into: Tensor, axis: int, at: Tensor, fresh: Tensor, wanted: Tensor, in_place: bool) -> Tensor:
    """`fresh` written to slots `at` (B, m) of the axis where it is `wanted`; in a copy unless `in_place`."""
    shape = [1, 1, 1, 1]
    shape[0], shape[axis] = at.shape
    index = at.view(shape).expand(fresh.shape)
    merged = torch.where(wanted, fresh.to(into.dtype), into.gather(axis, index))
    return into.scatter_(axis, index, merged) if in_place else into.scatter(axis, index, merged)
