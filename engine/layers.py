"""The layers that both model kinds are made of. They know positions packed along one axis T, and no block or session.

Ordinary torch modules with ordinary parameters; `pack` turns them, once and for good, into what serves fastest.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.base import Backend, KVView, Rotary, Scoring
from engine.attention.dense import DenseView, Past, check_lengths, check_mask, check_past, check_rotary, check_shapes
from engine.attention.mask import attending
from engine.errors import InvalidInput
from engine.packing import Arena, pack_int8, pack_plain
from engine.parallel import Parallel, Ranks, divide

ROWS, COLUMNS = 0, 1  # of a linear's weight: its outputs, its inputs


class Linear(nn.Linear):
    """y = x W^T + b. Packed on the CPU it holds the weight in a layout that reads at memory speed from one row to
    thousands; nothing but `forward` works then. Cut, before that, it holds this rank's part of the weight.

    The layout is the native kernels' (engine.packing) where they are loaded (see `use_kernels`), else oneDNN's. By the
    kernels a row's result depends on no other row. With `int8` the weight becomes 8-bit integers, half the bytes to
    read, and inputs are rounded to 16 bits.
    """

    arena: Arena | None = None  # where the native kernels' weights are kept
    int8 = False  # native only
    packed: Tensor | None = None
    offset: Tensor | None = None  # what the kernels add, float32 (out,): the bias, or zeros
    ranks: Ranks | None = None  # those that hold the rest
    cut: int | None = None  # ROWS or COLUMNS

    def shard_rows(self, ranks: Ranks) -> None:
        """This rank's share of the outputs, from a whole input."""
        self.ranks, self.cut = ranks, ROWS
        self.out_features //= ranks.size
        self.weight = _share(self.weight, ranks, ROWS)
        if self.bias is not None:
            self.bias = _share(self.bias, ranks)

    def shard_columns(self, ranks: Ranks) -> None:
        """The whole output, from this rank's share of the inputs: the ranks' products are added, then the bias."""
        self.ranks, self.cut = ranks, COLUMNS
        self.in_features //= ranks.size
        self.weight = _share(self.weight, ranks, COLUMNS)

    @property
    def native(self) -> bool:
        return self.arena is not None

    @property
    def matrix(self) -> Tensor:
        """W, as [out, in]."""
        return self.weight

    def pack(self) -> None:
        if self.weight.device.type != "cpu":
            return
        weight = self.matrix.detach()
        if self.arena is not None:
            self._pack_native(weight, self.arena)
            return
        # float16 products are some twenty times slower here than float32 ones, which hold every float16 exactly.
        wide = weight.float() if weight.dtype == torch.float16 else weight
        # 16 is a hint of rows to come; the layout it picks serves every number of rows (1 or 128 was slower).
        self.packed = torch.ops.mkldnn._reorder_linear_weight.default(wide, 16)
        self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().to(wide.dtype), requires_grad=False)

    def _pack_native(self, weight: Tensor, arena: Arena) -> None:
        self.packed = arena.keep(pack_int8(weight) if self.int8 else pack_plain(weight))
        added_here = self.bias is not None and self.cut != COLUMNS
        self.offset = self.bias.detach().float() if added_here else torch.zeros(self.out_features)
        self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

    @classmethod
    def fused(cls, parts: Sequence["Linear"]) -> "Linear":
        """One packed linear that gives the parts' outputs side by side; the parts, alike in bias, are emptied."""
        size_in = parts[0].in_features
        whole = cls(size_in, sum(part.out_features for part in parts), bias=False, device="meta")
        weight = torch.cat([part.matrix.detach() for part in parts])
        whole.weight = nn.Parameter(weight, requires_grad=False)
        if parts[0].bias is not None:
            whole.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
        whole.arena, whole.int8 = parts[0].arena, parts[0].int8
        for part in parts:
            part.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        whole.pack()
        return whole

    def forward(self, input: Tensor) -> Tensor:
        if self.ranks is None:
            return self._product(input, self.bias)
        if self.cut == ROWS:
            return self._product(self.ranks.copy(input), self.bias)
        out = self.ranks.sum(self._product(input, None))
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def scores(self, input: Tensor) -> Tensor:
        """The output in float32, not rounded on the way where the kernels compute it; of a linear that is not cut."""
        if self.native and self.packed is not None:
            wide: Tensor = torch.ops.keypast.linear.default(input, self.packed, self.offset, torch.float32)
            return wide
        out: Tensor = self(input)
        return out.float()

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed is None:
            return F.linear(input, self.matrix.to(input.dtype), None if bias is None else bias.to(input.dtype))
        if self.native:
            product: Tensor = torch.ops.keypast.linear.default(input, self.packed, self.offset)
            return product
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            input.to(self.packed.dtype), self.packed, bias, "none", [], ""
        )
        return out.to(input.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, after adding a residual (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.ranks: Ranks | None = None  # those that norm other heads with the same weight

    def forward(self, x: Tensor, residual: Tensor | None, backend: Backend) -> tuple[Tensor, Tensor]:
        """(norm(s), s) with s = x + residual; x (..., size)."""
        weight = self.weight if self.ranks is None else self.ranks.copy(self.weight)
        return backend.rms_norm(x, weight, self.eps, residual)


class LayerNorm(nn.LayerNorm):
    """torch's, with RMSNorm's call."""

    def forward(self, x: Tensor, residual: Tensor | None, backend: Backend) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x if residual is None else x + residual
        return super().forward(total), total


class MultiHeadAttention(nn.Module):
    """Projects, hands q, k, v to the KV view, projects back. heads is a multiple of kv_heads.

    `kdim`, `vdim`: widths of key and value where they are not hidden_size. `bias_kv`: one learnt key and value more;
    `zero_attn`: one of zeros more (torch's add_bias_kv and add_zero_attn). `qk_norm`: an RMSNorm over each head's
    channels of q and k, before the rotation, with this eps. Products run in `compute_dtype`, in which the output comes,
    the softmax in `softmax_dtype`. Dropout, of probabilities and of the output, acts in training mode only.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        qkv_bias: bool = True,
        output_bias: bool = True,
        bias_kv: bool = False,
        zero_attn: bool = False,
        qk_norm: float | None = None,
        attention_dropout: float = 0.0,
        output_dropout: float = 0.0,
        compute_dtype: torch.dtype = torch.float16,
        softmax_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = head_dim or hidden_size // heads
        kv_size = self.kv_heads * self.head_dim
        self.q_proj = Linear(hidden_size, self.heads * self.head_dim, bias=qkv_bias)
        self.k_proj = Linear(kdim or hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = Linear(vdim or hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = Linear(self.heads * self.head_dim, hidden_size, bias=output_bias)
        self.q_norm = None if qk_norm is None else RMSNorm(self.head_dim, qk_norm)
        self.k_norm = None if qk_norm is None else RMSNorm(self.head_dim, qk_norm)
        self.bias_k = nn.Parameter(torch.zeros(kv_size)) if bias_kv else None
        self.bias_v = nn.Parameter(torch.zeros(kv_size)) if bias_kv else None
        self.zero_attn = zero_attn
        self.attention_dropout, self.output_dropout = attention_dropout, output_dropout
        self.compute_dtype, self.softmax_dtype = compute_dtype, softmax_dtype
        self.scale = self.head_dim**-0.5
        self.ranks: Ranks | None = None  # those that hold the other heads
        self.qkv: Linear | None = None
        self._packed_scoring: Scoring | None = None

    def shard(self, parallel: Parallel) -> None:
        """Keeps this rank's heads and lets the others go; once, before `pack`. From then on `heads` and `kv_heads` are
        this rank's own and so is the past; inputs, outputs, masks and probabilities are the whole layer's. In training
        with dropout the ranks must be seeded alike.

        Raises InvalidInput for heads that the ranks cannot share evenly.
        """
        ranks = parallel.model
        divide("model_parallel", ranks.size, "the layer", heads=self.heads, kv_heads=self.kv_heads)
        self.ranks = ranks
        self.heads //= ranks.size
        self.kv_heads //= ranks.size
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            linear.shard_rows(ranks)
        self.o_proj.shard_columns(ranks)
        if self.bias_k is not None and self.bias_v is not None:
            self.bias_k, self.bias_v = _share(self.bias_k, ranks), _share(self.bias_v, ranks)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.ranks = ranks

    def pack(self, *, self_attention: bool) -> None:
        """`self_attention`: query, key and value will always be one tensor, so one linear gives all three."""
        if self_attention:
            self.qkv = Linear.fused([self.q_proj, self.k_proj, self.v_proj])
        else:
            for linear in (self.q_proj, self.k_proj, self.v_proj):
                linear.pack()
        self.o_proj.pack()
        self._packed_scoring = self.scoring

    @property
    def scoring(self) -> Scoring:
        if self._packed_scoring is not None:
            return self._packed_scoring
        dropout = self.attention_dropout if self.training else 0.0
        return Scoring(
            self.scale, self._extra(self.bias_k), self._extra(self.bias_v), self.softmax_dtype, dropout, self.ranks
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, kv: KVView, layer: int = 0, rotary: Rotary | None = None
    ) -> Tensor:
        """query (..., hidden_size), key (..., kdim), value (..., vdim) -> (..., hidden_size) in compute_dtype.

        The axes before the last are the view's: (T,) packed for blocks, (B, n) for pasts that are plain tensors.
        """
        q, k, v = self._project(query, key, value)
        q = q.view(*q.shape[:-1], self.heads, self.head_dim)
        k = k.view(*k.shape[:-1], self.kv_heads, self.head_dim)
        v = v.view(*v.shape[:-1], self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, _ = self.q_norm(q, None, kv.backend)
            k, _ = self.k_norm(k, None, kv.backend)
        out: Tensor = self.o_proj(kv.attend(layer, q, k, v, rotary, self.scoring))
        return F.dropout(out, self.output_dropout) if self.training and self.output_dropout else out

    def stateless(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        past: Past | None = None,
        batch_valid_length: Tensor | None = None,
        causal: bool = False,
        rotary: Rotary | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        in_place: bool = False,
    ) -> tuple[Tensor, Past, Tensor | None]:
        """Past in, present out: (attn_out (B, n, hidden_size), present, probabilities or None). Those are
        (B, heads, n, T + E), or (B, n, T + E) averaged.

        query (B, n, hidden_size), key (B, m, kdim), value (B, m, vdim); query alone reads the past and appends nothing.
        attention_mask (B, n, T) or (B, heads, n, T), 1 = attend: over the past's T slots, or without one the m keys.
        batch_valid_length (B,): each row's length after the call, of its m new positions; default: all of them.
        in_place: the past's own tensors are written, its length too, and are what is returned. Nothing is read on the
        host, so that the call can be captured in a graph; lengths are not checked then: a position beyond the last
        slot is dropped and not counted.

        Raises InvalidInput, LengthExceeded; nothing has changed then.
        """
        if (key is None) != (value is None):
            raise InvalidInput("value" if value is None else "key", "key and value come together, or not at all")
        widths = self.q_proj.in_features, self.k_proj.in_features, self.v_proj.in_features
        key = query.new_empty(query.shape[0], 0, widths[1]) if key is None else key
        value = query.new_empty(query.shape[0], 0, widths[2]) if value is None else value
        check_shapes(widths, query, key, value, past, batch_valid_length)
        (batch, n, _), m = query.shape, key.shape[1]
        slots = m
        if past is not None:
            check_past(past, batch, self.kv_heads, self.head_dim)
            slots = past.key.shape[-1]
        elif in_place:
            raise InvalidInput("past", "in_place writes the past's own tensors: give one, as empty_past makes it")
        if attention_mask is not None:
            all_heads = self.heads if self.ranks is None else self.heads * self.ranks.size
            check_mask(attention_mask, (batch, all_heads, n, slots))
        if rotary is not None:
            check_rotary(rotary, n, m, slots)
        if not in_place:
            check_lengths(past, m, batch_valid_length)
        new = batch_valid_length
        if past is not None and batch_valid_length is not None:
            new = batch_valid_length - past.length
        bias = None if attention_mask is None else attending(attention_mask)
        if bias is not None and bias.dim() == 3:
            bias = bias[:, None]
        if self.ranks is not None and bias is not None and bias.shape[1] > 1:
            bias = self.ranks.share(bias, 1)
        view = DenseView(bias=bias, past=past, new=new, causal=causal, in_place=in_place, need_weights=need_weights)
        out = self(query, key, value, view, rotary=rotary)
        assert view.present is not None  # the call has set it
        weights = view.weights
        if self.ranks is not None and weights is not None:
            weights = self.ranks.join(weights, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return out, view.present, weights

    def empty_past(self, batch_size: int, slots: int, dtype: torch.dtype | None = None) -> Past:
        """A past of no positions with room for `slots`, on the layer's device; `dtype`: compute_dtype if not given."""
        dtype = dtype or self.compute_dtype
        key = torch.zeros(batch_size, self.kv_heads, self.head_dim, slots, dtype=dtype, device=self._device)
        value = torch.zeros(batch_size, self.kv_heads, slots, self.head_dim, dtype=dtype, device=self._device)
        return Past(key, value, torch.zeros(batch_size, dtype=torch.int32, device=self._device))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.compute_dtype
        if self.qkv is None:
            return self.q_proj(query.to(dtype)), self.k_proj(key.to(dtype)), self.v_proj(value.to(dtype))
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = torch.split(self.qkv(query.to(dtype)), sizes, dim=-1)
        return q, k, v

    def _extra(self, bias: Tensor | None) -> Tensor | None:
        """The layer's own keys, or values: (E, kv_heads, head_dim), float32 at least."""
        if bias is None and not self.zero_attn:
            return None
        dtype = torch.promote_types(self.compute_dtype, torch.float32)
        zeros = torch.zeros(int(self.zero_attn), self.kv_heads, self.head_dim, dtype=dtype, device=self._device)
        if bias is None:
            return zeros
        rounded = bias.to(self.compute_dtype).to(dtype).view(1, self.kv_heads, self.head_dim)
        return torch.cat([rounded, zeros]).contiguous()

    @property
    def _device(self) -> torch.device:
        return self.o_proj.weight.device


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

    def shard(self, parallel: Parallel) -> None:
        """Keeps this rank's part of the inner features; once, before `pack`. Raises InvalidInput."""
        divide("model_parallel", parallel.model.size, "the layer", intermediate_size=self.up_proj.out_features)
        for linear in (self.gate_proj, self.up_proj):
            if linear is not None:
                linear.shard_rows(parallel.model)
        self.down_proj.shard_columns(parallel.model)

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

    def shard(self, parallel: Parallel) -> None:
        self.attention.shard(parallel)
        self.feed_forward.shard(parallel)

    def pack(self) -> None:
        self.attention.pack(self_attention=True)
        self.feed_forward.pack()

    def packed_weights(self) -> list[Tensor | None] | None:
        """What PackedBlocks lists for a block, or None if this one is not of that form: a cut one adds in between."""
        attention, feed_forward = self.attention, self.feed_forward
        norms = [self.attention_norm, self.feed_forward_norm]
        linears = [attention.qkv, attention.o_proj, feed_forward.gate_up, feed_forward.down_proj]
        if not all(isinstance(norm, RMSNorm) for norm in norms) or any(
            linear is None or linear.ranks is not None or linear.packed is None or not linear.native
            for linear in linears
        ):
            return None
        qkv, o_proj, gate_up, down_proj = ([linear.packed, linear.offset] for linear in linears if linear is not None)
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


def use_kernels(model: nn.Module, *, int8: bool = False) -> None:
    """Has `pack` keep every linear of the model for the native kernels, which must be loaded by the first pass."""
    arena = Arena()
    for module in model.modules():
        if isinstance(module, Linear):
            module.arena, module.int8 = arena, int8


def _share(parameter: Tensor, ranks: Ranks, axis: int = 0) -> nn.Parameter:
    return nn.Parameter(ranks.share(parameter.detach(), axis), requires_grad=parameter.requires_grad)
