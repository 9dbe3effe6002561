"""Kind `attention`: one MultiHeadAttention; tensors in, tensors out. The caller's mask is the truth on prefill."""

import torch
from torch import Tensor, nn

from engine.attention.view import PagedView
from engine.batch import Row, RowResult
from engine.errors import InvalidInput
from engine.layers import MultiHeadAttention
from engine.specs import KVSpec, ModelSpec, TensorSpec

INPUT_DTYPES = ("float16", "float32")
MASK_DTYPES = ("float16", "float32", "bool", "uint8", "int32", "int64")


def attention_spec(
    name: str, layer: MultiHeadAttention, *, kv_dtype: str, max_length: int, fingerprint: str
) -> ModelSpec:
    hidden_size = layer.o_proj.out_features
    tensors = tuple(TensorSpec(field, INPUT_DTYPES, (hidden_size,)) for field in ("query", "key", "value"))
    mask = TensorSpec("attention_mask", MASK_DTYPES, ("T",), required=False, values=(0, 1))
    weight = layer.o_proj.weight
    return ModelSpec(
        name=name,
        kind="attention",
        inputs=(*tensors, mask),
        outputs=(
            TensorSpec("attn_out", INPUT_DTYPES, (hidden_size,)),
            TensorSpec("attn_weights", ("float32",), ("T",), required=False),
        ),
        kv=KVSpec(1, layer.kv_heads, layer.head_dim, kv_dtype),
        causal=False,
        max_length=max_length,
        dtype=str(weight.dtype).removeprefix("torch."),
        device=weight.device.type,
        fingerprint=fingerprint,
    )


class AttentionModel(nn.Module):
    def __init__(self, spec: ModelSpec, layer: MultiHeadAttention) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer

    def pack(self) -> None:
        self.layer.pack(self_attention=False)

    def forward(self, inputs: dict[str, Tensor], kv: PagedView) -> Tensor:
        out: Tensor = self.layer(inputs["query"], inputs["key"], inputs["value"], kv)
        return out

    def outputs(self, hidden: Tensor, rows: list[Row], starts: list[int], kv: PagedView) -> list[RowResult]:
        """attn_out in the query's dtype; attn_weights (N, n, T), or (n, T) averaged over the N heads."""
        if not torch.isfinite(hidden).all():
            raise InvalidInput("value", f"keys or values overflow the {self.spec.kv.dtype} past; scale the inputs down")
        wide = hidden.float().cpu().numpy()
        results = []
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            attn_out = wide[start : start + row.count].astype(row.work.inputs["query"].dtype)
            result = RowResult({"attn_out": attn_out})
            if row.work.want.need_weights and kv.weights is not None:
                weights = kv.weights[0][index]
                averaged = weights.mean(0) if row.work.want.average_attn_weights else weights
                result.once["attn_weights"] = averaged.cpu().numpy()
            results.append(result)
        return results
