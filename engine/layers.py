"""The layers that both model kinds are made of. They know positions packed along one axis T, and no block or session.

Ordinary torch modules with ordinary parameters; `pack` turns them, once and for good, into what serves fastest.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.base import Backend, Rotary
from engine.attention.view import KVView


class Linear(nn.Linear):
    """y = x W^T + b. Packed on the CPU it holds the weight in oneDNN's own layout, which reads at memory speed from one
    row to thousands; nothing but `forward` works then."""

    packed: Tensor | None = None

    def pack(self) -> None:
        if self.weight.device.type == "cpu" and self.weight.dtype in (torch.bfloat16, torch.float32):
            weight = self.weight.detach()
            # 16 is a hint of rows to come; the layout it picks serves every number of rows (1 or 128 was slower).
            self.packed = torch.ops.mkldnn._reorder_linear_weight.default(weight, 16)
            self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

    @classmethod
    def fused(cls, parts: Sequence["Linear"]) -> "Linear":
        """One packed linear that gives the parts' outputs side by side; the parts, alike in bias, are emptied."""
        size_in = parts[0].in_features
        whole = cls(size_in, sum(part.out_features for part in parts), bias=False, device="meta")
        weight = torch.cat([part.weight.detach() for part in parts])
        whole.weight = nn.Parameter(weight, requires_grad=False)
        if parts[0].bias is not None:
            whole.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
        for part in parts:
            part.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        whole.pack()
        return whole

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(input, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(input, self.packed, self.bias, "none", [], "")
        return out


class RMSNorm(nn.Module):
    """x / rms(x) * weight, after adding a residual (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None, backend: Backend) -> tuple[Tensor, Tensor]:
        """(norm(s), s) with s = x + residual; x (..., size)."""
        return backend.rms_norm(x, self.weight, self.eps, residual)


class LayerNorm(nn.LayerNorm):
    """torch's, with RMSNorm's call."""

    def forward(self, x: Tensor, residual: Tensor | None, backend: Backend) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x if residual is None else x + residual
        return super().forward(total), total


class MultiHeadAttention(nn.Module):
    """Projects, hands q, k, v to the KV view, projects back. heads is a multiple of kv_heads.

    `qk_norm`: an RMSNorm over each head's channels of q and k, before the rotation, with this eps.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        output_bias: bool = True,
        qk_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = head_dim or hidden_size // heads
        self.scale = self.head_dim**-0.5
        self.q_proj = Linear(hidden_size, self.heads * self.head_dim, bias=qkv_bias)
        self.k_proj = Linear(hidden_size, self.kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = Linear(hidden_size, self.kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = Linear(self.heads * self.head_dim, hidden_size, bias=output_bias)
        self.q_norm = None if qk_norm is None else RMSNorm(self.head_dim, qk_norm)
        self.k_norm = None if qk_norm is None else RMSNorm(self.head_dim, qk_norm)
        self.qkv: Linear | None = None

    def pack(self, *, self_attention: bool) -> None:
        """`self_attention`: query, key and value will always be one tensor, so one linear gives all three."""
        if self_attention:
            self.qkv = Linear.fused([self.q_proj, self.k_proj, self.v_proj])
        else:
            for linear in (self.q_proj, self.k_proj, self.v_proj):
                linear.pack()
        self.o_proj.pack()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, kv: KVView, layer: int = 0, rotary: Rotary | None = None
    ) -> Tensor:
        """query, key, value (T, hidden_size) -> (T, hidden_size)."""
        q, k, v = self._project(query, key, value)
        q = q.view(-1, self.heads, self.head_dim)
        k = k.view(-1, self.kv_heads, self.head_dim)
        v = v.view(-1, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, _ = self.q_norm(q, None, kv.backend)
            k, _ = self.k_norm(k, None, kv.backend)
        out: Tensor = self.o_proj(kv.attend(layer, q, k, v, rotary, self.scale))
        return out

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = torch.split(self.qkv(query), sizes, dim=-1)
        return q, k, v


class FeedForward(nn.Module):
    """`activation`: "silu_gate" (SwiGLU: down(silu(gate(x)) * up(x))), or "gelu" | "gelu_tanh" (down(gelu(up(x))))."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, *, bias: bool) -> None:
        super().__init__()
        self.gated = activation == "silu_gate"
        self._gelu = "tanh" if activation == "gelu_tanh" else "none"
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias) if self.gated else None
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.gate_up: Linear | None = None

    def pack(self) -> None:
        if self.gate_proj is not None:
            self.gate_up = Linear.fused([self.gate_proj, self.up_proj])
        else:
            self.up_proj.pack()
        self.down_proj.pack()

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """x (T, hidden_size) -> the same."""
        if self.gate_up is not None:
            inner = backend.silu_gate(self.gate_up(x))
        elif self.gate_proj is not None:
            inner = backend.silu_gate(torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1))
        else:
            inner = F.gelu(self.up_proj(x), approximate=self._gelu)
        out: Tensor = self.down_proj(inner)
        return out


class DecoderBlock(nn.Module):
    """Pre-norm: attention, then feed-forward. What a sublayer gives is added by the next norm, in one pass."""

    def __init__(
        self, attention_norm: nn.Module, attention: MultiHeadAttention, feed_forward_norm: nn.Module, ffn: FeedForward
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = ffn

    def pack(self) -> None:
        self.attention.pack(self_attention=True)
        self.feed_forward.pack()

    def packed_weights(self) -> list[Tensor | None] | None:
        """What PackedBlocks lists for a block, or None if this one is not of that form."""
        attention, feed_forward = self.attention, self.feed_forward
        norms = [self.attention_norm, self.feed_forward_norm]
        linears = [attention.qkv, attention.o_proj, feed_forward.gate_up, feed_forward.down_proj]
        if not all(isinstance(norm, RMSNorm) for norm in norms) or any(
            linear is None or linear.packed is None for linear in linears
        ):
            return None
        qkv, o_proj, gate_up, down_proj = ([linear.packed, linear.bias] for linear in linears if linear is not None)
        head_norms = [None if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm)]
        first, second = ([norm.weight] for norm in norms if isinstance(norm, RMSNorm))
        return [*first, *qkv, *head_norms, *o_proj, *second, *gate_up, *down_proj]

    def forward(
        self, x: Tensor, delta: Tensor | None, kv: KVView, layer: int, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """x (T, H), the residual stream; `delta`, what the last block gave and nobody added yet. Returns (x, delta)."""
        normed, x = self.attention_norm(x, delta, kv.backend)
        delta = self.attention(normed, normed, normed, kv, layer, rotary)
        normed, x = self.feed_forward_norm(delta, x, kv.backend)
        return x, self.feed_forward(normed, kv.backend)
