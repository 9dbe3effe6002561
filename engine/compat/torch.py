"""torch.nn.MultiheadAttention, and the past: a drop-in that is torch's own layer until a call brings `past=`."""

import torch
from torch import Tensor
from torch.nn import MultiheadAttention as TorchMultiheadAttention

from engine.attention.dense import DenseView, Past, check_lengths, check_past, check_shapes
from engine.attention.mask import hiding
from engine.compat.convert import QKV, from_torch
from engine.errors import InvalidInput
from engine.layers import MultiHeadAttention


class MultiheadAttention(TorchMultiheadAttention):
    """Constructor, attributes, state dict and call of torch.nn.MultiheadAttention. Its `forward` takes two more:

    past: keys and values that are there (see `empty_past`). The call's own are put behind them, the queries attend to
        what is there then, and the present is returned besides: (attn_output, attn_output_weights or None, present).
        Without key and value the past is only read (cross-attention over a source that stays).
    batch_valid_length: int (N,), each row's length after the call, for rows that bring fewer keys than the others (the
        first ones count); default: past.length + S.
    """

    def empty_past(self, batch_size: int, slots: int, dtype: torch.dtype | None = None) -> Past:
        """A past of no positions with room for `slots`, on the layer's device, in its dtype if none is given: key
        (N, heads, head_dim, slots), value (N, heads, slots, head_dim)."""
        like, heads, size = self.out_proj.weight.detach(), self.num_heads, self.head_dim
        return Past(
            key=like.new_zeros(batch_size, heads, size, slots, dtype=dtype),
            value=like.new_zeros(batch_size, heads, slots, size, dtype=dtype),
            length=torch.zeros(batch_size, dtype=torch.int32, device=like.device),
        )

    def forward(  # type: ignore[override]  # with a past, the present too
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        past: Past | None = None,
        batch_valid_length: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Past]:
        """As torch's. With a past of T slots:

        attn_mask (L, T) or (N * heads, L, T) and key_padding_mask (N, T) are over the slots, True = may not attend,
        floats are added; slots beyond a row's length are never seen. is_causal: query i sees keys up to its own place,
        past.length + i, and needs no attn_mask. attn_output_weights (N, L, T + E) or (N, heads, L, T + E): E columns
        at the end for add_bias_kv and add_zero_attn; after dropout, as torch's. A query that sees nothing attends to
        zeros. Unbatched: N = 1 in the past and no N elsewhere. Gradients flow into weights, inputs, masks and the past.

        Raises InvalidInput naming the argument, LengthExceeded when a row would pass its T slots (with a past);
        TypeError for key or value missing, or batch_valid_length given, without one; and what torch raises.
        """
        if past is None:
            if key is None or value is None or batch_valid_length is not None:
                raise TypeError("without a past, key and value are required and batch_valid_length has no meaning")
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = self._rows(query, key, value, past, batch_valid_length)
        view = DenseView(
            bias=self._bias(attn_mask, key_padding_mask, q.shape[1], past),
            past=past,
            new=None if batch_valid_length is None else batch_valid_length - past.length,
            causal=is_causal,
            need_weights=need_weights,
        )
        out = self._attend(q, k, v, view)
        assert view.present is not None  # the call has set it
        weights = None if view.weights is None else view.weights.to(out.dtype)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if query.dim() == 2:
            return out[0], None if weights is None else weights[0], view.present
        return out if self.batch_first else out.transpose(0, 1), weights, view.present

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, view: DenseView) -> Tensor:
        """The core over this layer's own parameters. It is made for the call and holds nothing (half a millisecond): so
        whatever is set on this layer counts at once, threads may share the layer, and gradients reach its parameters.
        """
        dtype = self.out_proj.weight.dtype
        with torch.device("meta"):
            core = MultiHeadAttention(
                self.embed_dim,
                self.num_heads,
                kdim=self.kdim,
                vdim=self.vdim,
                qkv_bias=self.in_proj_bias is not None,
                output_bias=self.out_proj.bias is not None,
                bias_kv=self.bias_k is not None,
                zero_attn=self.add_zero_attn,
                attention_dropout=self.dropout,
                compute_dtype=dtype,
                softmax_dtype=torch.promote_types(dtype, torch.float32),
            ).train(self.training)
        names = [f"{name}_weight" for name in ("in_proj", *QKV)] + ["in_proj_bias", "bias_k", "bias_v"]
        own = {name: getattr(self, name) for name in names}
        own |= {"out_proj.weight": self.out_proj.weight, "out_proj.bias": self.out_proj.bias}
        weights = from_torch({name: tensor for name, tensor in own.items() if tensor is not None})
        out: Tensor = torch.func.functional_call(core, weights, (query, key, value, view))
        return out

    def _rows(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, past: Past, valid_length: Tensor | None
    ) -> list[Tensor]:
        """query (N, L, E), key (N, S, kdim), value (N, S, vdim), whatever the caller's layout; none is S = 0."""
        if (key is None) != (value is None):
            raise InvalidInput("value" if value is None else "key", "key and value come together, or not at all")
        widths, dtype = (self.embed_dim, self.kdim, self.vdim), self.out_proj.weight.dtype
        rows: list[Tensor] = []
        for name, tensor, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
            if tensor is None:
                rows.append(rows[0].new_empty(rows[0].shape[0], 0, width))
                continue
            if query.dim() not in (2, 3) or tensor.dim() != query.dim():
                raise InvalidInput(name, f"query, key and value must be all 3-D or all 2-D, got {tuple(tensor.shape)}")
            if tensor.dtype != dtype and not torch.is_autocast_enabled(tensor.device.type):
                raise InvalidInput(name, f"must have the layer's dtype {dtype}, got {tensor.dtype}")
            rows.append(tensor[None] if tensor.dim() == 2 else tensor if self.batch_first else tensor.transpose(0, 1))
        q, k, v = rows
        check_shapes(widths, q, k, v, past, valid_length)
        check_past(past, q.shape[0], self.num_heads, self.head_dim)
        check_lengths(past, k.shape[1], valid_length)
        return rows

    def _bias(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, n: int, past: Past) -> Tensor | None:
        """Both masks together, as what is added to scores: it broadcasts to (N, heads, n, T)."""
        batch, heads, _, slots = past.key.shape
        total = None
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise InvalidInput(name, f"must be bool (True = may not attend) or floats to add, got {mask.dtype}")
            if name == "attn_mask":
                shapes = {(n, slots): (1, 1, n, slots), (batch * heads, n, slots): (batch, heads, n, slots)}
            else:
                shapes = {(batch, slots): (batch, 1, 1, slots)} | ({(slots,): (1, 1, 1, slots)} if batch == 1 else {})
            if tuple(mask.shape) not in shapes:
                wanted = " or ".join(map(str, shapes))
                raise InvalidInput(name, f"must be {wanted} for a past of {slots} slots, got {tuple(mask.shape)}")
            bias = hiding(mask).reshape(shapes[tuple(mask.shape)])
            total = bias if total is None else total + bias
        return total

    def __prepare_scriptable__(self) -> TorchMultiheadAttention:
        """What torch.jit.script compiles: torch's own layer over the same parameters, which knows no past. Scripting a
        model that holds this layer leaves torch's in its place there, too (so torch.jit does it): script a copy."""
        plain = TorchMultiheadAttention.__new__(TorchMultiheadAttention)
        plain.__dict__ = self.__dict__
        return plain
