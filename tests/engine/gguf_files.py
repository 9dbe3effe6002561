"""Small GGUF files, written by the `gguf` package."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 32, 4, 2, 8, 64, 12
Weights = dict[str, NDArray[np.float32]]
TOKENS = ["<|end|>", "a", "b", "c", "ab", "Ġ", "Ġa", "1", "2", "<tool>", "Ċ", "[PAD0]"]
TYPES = [3, 1, 1, 1, 1, 1, 1, 1, 1, 4, 1, 5]
TEXT_KEYS: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": np.array(TYPES, dtype=np.int32),
    "tokenizer.ggml.merges": ["a b", "Ġ a"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.eot_token_id": 4,
    "tokenizer.ggml.bos_token_id": 0,
}


def random_weights(architecture: str) -> Weights:
    """A one-layer model by GGUF names, [out, in], not permuted: what the conversion must give back."""
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return draw.standard_normal(shape).astype(np.float32)

    weights = {
        "token_embd.weight": normal(VOCABULARY, HIDDEN),
        "output_norm.weight": normal(HIDDEN),
        "blk.0.attn_norm.weight": normal(HIDDEN),
        "blk.0.ffn_norm.weight": normal(HIDDEN),
        "blk.0.attn_output.weight": normal(HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_up.weight": normal(INNER, HIDDEN),
        "blk.0.ffn_down.weight": normal(HIDDEN, INNER),
    }
    if architecture == "gpt2":
        weights |= {"position_embd.weight": normal(16, HIDDEN), "output_norm.bias": normal(HIDDEN)}
        weights |= {"blk.0.attn_qkv.weight": normal(3 * HIDDEN, HIDDEN), "blk.0.attn_qkv.bias": normal(3 * HIDDEN)}
        for name, size in (("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_output", HIDDEN)):
            weights[f"blk.0.{name}.bias"] = normal(size)
        weights |= {"blk.0.ffn_up.bias": normal(INNER), "blk.0.ffn_down.bias": normal(HIDDEN)}
        return weights
    weights["blk.0.ffn_gate.weight"] = normal(INNER, HIDDEN)
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        weights[f"blk.0.attn_{name}.weight"] = normal(heads * HEAD_DIM, HIDDEN)
        if architecture == "qwen2":
            weights[f"blk.0.attn_{name}.bias"] = normal(heads * HEAD_DIM)
    if architecture == "qwen3":
        weights |= {"blk.0.attn_q_norm.weight": normal(HEAD_DIM), "blk.0.attn_k_norm.weight": normal(HEAD_DIM)}
    return weights


def model_keys(architecture: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "block_count": 1,
        "context_length": 16,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
    }
    if architecture == "gpt2":
        keys["attention.layer_norm_epsilon"] = 1e-5
    else:
        keys |= {"attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-6}
        keys |= {"rope.freq_base": 5_000.0, "rope.dimension_count": HEAD_DIM}
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def permuted(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp's row order for llama files, row by row from its definition: out[2 i + j] = in[j * half + i]."""
    half = values.shape[0] // heads // 2
    out = np.empty_like(values)
    for head in range(heads):
        base = 2 * half * head
        for i in range(half):
            for j in range(2):
                out[base + 2 * i + j] = values[base + j * half + i]
    return out


def write(
    path: Path,
    architecture: str,
    weights: Weights,
    keys: dict[str, Any] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Matrices of 32 columns or more are stored as `kind`, the rest as float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**model_keys(architecture), **TEXT_KEYS, **(keys or {})}.items():
        if value is None:
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    for name, values in weights.items():
        stored = values
        if architecture == "llama" and ("attn_q." in name or "attn_k." in name):
            stored = permuted(values, HEADS if "attn_q." in name else KV_HEADS)
        if kind != gguf.GGMLQuantizationType.F32 and stored.ndim == 2:
            writer.add_tensor(name, gguf.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
