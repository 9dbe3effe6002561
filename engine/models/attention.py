"""Kind `attention`: one MultiHeadAttention; tensors in, tensors out. The caller's mask is the truth on prefill.

n queries with m keys and values: as many of both (self-attention), queries alone over keys that stay (the decoder side
of cross-attention), keys alone (the encoder's, brought once), or any other pair of numbers.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.base import Rotary
from engine.attention.view import PagedView
from engine.batch import Array, Row, RowResult
from engine.errors import InvalidInput
from engine.layers import MultiHeadAttention
from engine.specs import KVSpec, ModelSpec, TensorSpec

INPUT_DTYPES = ("float16", "float32")
MASK_DTYPES = ("float16", "float32", "bool", "uint8", "int32", "int64")


def attention_spec(
    name: str,
    layer: MultiHeadAttention,
    *,
    kv_dtype: str,
    max_length: int,
    fingerprint: str,
    aligned: bool = False,
) -> ModelSpec:
    """`aligned`: with rotary tables."""
    hidden_size = layer.o_proj.out_features
    query = TensorSpec("query", INPUT_DTYPES, (layer.q_proj.in_features,))
    key = TensorSpec("key", INPUT_DTYPES, (layer.k_proj.in_features,), axis="m")
    value = TensorSpec("value", INPUT_DTYPES, (layer.v_proj.in_features,), axis="m")
    mask = TensorSpec("attention_mask", MASK_DTYPES, ("T",), required=False, values=(0, 1))
    own_keys = int(layer.bias_k is not None) + int(layer.zero_attn)
    weight = layer.o_proj.weight
    return ModelSpec(
        name=name,
        kind="attention",
        inputs=(query, key, value, mask),
        outputs=(
            TensorSpec("attn_out", INPUT_DTYPES, (hidden_size,)),
            TensorSpec("attn_weights", ("float32",), (f"T + {own_keys}" if own_keys else "T",), required=False),
        ),
        kv=KVSpec(1, layer.kv_heads, layer.head_dim, kv_dtype),
        causal=False,
        max_length=max_length,
        dtype=str(weight.dtype).removeprefix("torch."),
        device=weight.device.type,
        fingerprint=fingerprint,
        appends="m",
        aligned=aligned,
    )


class AttentionModel(nn.Module):
    def __init__(self, spec: ModelSpec, layer: MultiHeadAttention, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.rotary = rotary

    def pack(self) -> None:
        self.layer.pack(self_attention=False)

    def forward(self, inputs: dict[str, Tensor], kv: PagedView) -> Tensor:
        out: Tensor = self.layer(inputs["query"], inputs["key"], inputs["value"], kv, rotary=self.rotary)
        return out

    def logits(self, hidden: Tensor, kv: PagedView) -> None:
        return None

    def outputs(
        self, hidden: Tensor, rows: list[Row], starts: list[int], kv: PagedView, logits: Tensor | None = None
    ) -> list[RowResult]:
        """For every query, whatever its row appends: attn_out (n, H) in the query's dtype, attn_weights (N, n, T + E),
        or (n, T + E) averaged over the N heads. T is the mask's, E counts the layer's own keys."""
        self._check_written(kv)
        wide = hidden.float().cpu().numpy()
        results = []
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            result = RowResult()
            if row.queries:
                asked = row.work.inputs["query"].dtype
                result.positions["attn_out"] = _narrowed(wide[start : start + row.queries], asked)
            if row.queries and row.work.want.need_weights and kv.weights is not None:
                weights = _widened(kv.weights[0][index], row)
                averaged = weights.mean(0) if row.work.want.average_attn_weights else weights
                result.once["attn_weights"] = averaged.float().cpu().numpy()
            results.append(result)
        return results

    def _check_written(self, kv: PagedView) -> None:
        """A key or value that overflows is refused when it comes, not when some query meets it."""
        for name, finite in zip(("key", "value"), kv.finite(0), strict=True):
            if not finite:
                raise InvalidInput(name, f"{name}s overflow the {self.spec.kv.dtype} past; scale the inputs down")


def _narrowed(attn_out: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        narrow = attn_out.astype(dtype)
    if not np.isfinite(narrow).all():
        raise InvalidInput("query", f"the output overflows {dtype}; scale the inputs down or send it in float32")
    return narrow


def _widened(weights: Tensor, row: Row) -> Tensor:
    """A row's weights (N, n, present + E) as wide as those of the longest row of its session, (N, n, T + E): zeros for
    positions that it does not have, then the layer's own keys in the last E columns."""
    key = row.work.inputs.get("key")
    longest = max(row.work.past_length) + (0 if key is None else key.shape[1])
    if longest == row.stop:
        return weights
    return torch.cat([F.pad(weights[..., : row.stop], (0, longest - row.stop)), weights[..., row.stop :]], dim=-1)
