"""One layer's weights as three people would have saved them: from MindSpore, from torch and in our own names."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from engine.batch import Array

SIZE, HEADS = 64, 4


def trained_layer() -> torch.nn.MultiheadAttention:
    """float64, of values that float16 holds."""
    torch.manual_seed(21)
    layer = torch.nn.MultiheadAttention(SIZE, HEADS, batch_first=True).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, SIZE**-0.5)
    return layer.half().double()


def save_three(layer: torch.nn.MultiheadAttention, directory: Path) -> dict[str, Path]:
    """Written out by hand, not by what is tested."""
    q, k, v = layer.in_proj_weight.detach().float().chunk(3)
    q_bias, k_bias, v_bias = layer.in_proj_bias.detach().float().chunk(3)
    out, out_bias = layer.out_proj.weight.detach().float(), layer.out_proj.bias.detach().float()
    files = {
        "torch": {
            "in_proj_weight": torch.cat([q, k, v]),
            "in_proj_bias": torch.cat([q_bias, k_bias, v_bias]),
            "out_proj.weight": out,
            "out_proj.bias": out_bias,
        },
        "mindspore": {
            "attention.dense1.weight": q,
            "attention.dense1.bias": q_bias,
            "attention.dense2.weight": k,
            "attention.dense2.bias": k_bias,
            "attention.dense3.weight": v,
            "attention.dense3.bias": v_bias,
            "attention.projection.weight": out.T,  # the one that is stored [in, out]
            "attention.projection.bias": out_bias,
        },
        "ours": {
            "q_proj.weight": q,
            "q_proj.bias": q_bias,
            "k_proj.weight": k,
            "k_proj.bias": k_bias,
            "v_proj.weight": v,
            "v_proj.bias": v_bias,
            "o_proj.weight": out,
            "o_proj.bias": out_bias,
        },
    }
    for name, tensors in files.items():
        save_file(
            {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, directory / f"{name}.safetensors"
        )
    return {name: directory / f"{name}.safetensors" for name in files}


def sequences(batch: int, n: int) -> dict[str, Array]:
    """float16 query, key and value (batch, n, SIZE)."""
    generator = np.random.default_rng(22)
    return {name: generator.normal(size=(batch, n, SIZE)).astype(np.float16) for name in ("query", "key", "value")}


def causal(batch: int, n: int) -> Array:
    """1 = attend."""
    return np.repeat(np.tri(n, dtype=np.float16)[None], batch, 0)


def whole(layer: torch.nn.MultiheadAttention, inputs: dict[str, Array]) -> Array:
    """What torch gives in float64 over the whole sequence at once, (batch, n, SIZE)."""
    query, key, value = (torch.from_numpy(inputs[name]).double() for name in ("query", "key", "value"))
    hidden = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).triu(1)
    with torch.no_grad():
        out: Array = layer(query, key, value, attn_mask=hidden)[0].numpy()
    return out
