"""The metadata of a GGUF file as the config.json of the same model.

The keys are those of ggml-org/ggml docs/gguf.md and of llama.cpp's `convert_hf_to_gguf.py`, which wrote them from such
a config.json. What comes out goes through `DecoderConfig.from_hf` like any other.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.checkpoints.gguf_file import GGUFFile
from engine.errors import InvalidInput

ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's scaling, as one divisor per frequency

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_KNOWN_KEYS = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "tensor_data_layout",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)


def hub_config(source: GGUFFile) -> dict[str, Any]:
    """The config.json of the file's model; an unknown key of its architecture could change the arithmetic: refused."""
    architecture = source.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise InvalidInput(
            "architecture", f"{architecture!r} in {source.path.name} is not known; known: {', '.join(_ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    of_model = {key[len(prefix) :]: value for key, value in source.metadata.items() if key.startswith(prefix)}
    for key, value in of_model.items():
        if key not in _KNOWN_KEYS and value not in (0, False):
            raise InvalidInput("model", f"{prefix}{key} {value!r} is not supported")
    if "token_embd.weight" not in source.tensors:
        raise InvalidInput("model", "tensor 'token_embd.weight' is missing")
    read = _Keys(prefix, of_model)
    config = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "dtype": "float32",
        "vocab_size": source.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in source.tensors,
    }
    return config | (_gpt2_config(read) if architecture == "gpt2" else _rotary_config(source, read))


class _Keys:
    """The architecture's metadata; a missing key is refused by its full name."""

    def __init__(self, prefix: str, values: Mapping[str, Any]) -> None:
        self.prefix, self.values = prefix, values

    def __call__(self, key: str) -> Any:  # noqa: ANN401  DecoderConfig.from_hf checks the types
        if key not in self.values:
            raise InvalidInput("model", f"{self.prefix}{key} is missing")
        return self.values[key]


def _gpt2_config(read: _Keys) -> dict[str, Any]:
    return {
        "n_embd": read("embedding_length"),
        "n_layer": read("block_count"),
        "n_head": read("attention.head_count"),
        "n_positions": read("context_length"),
        "n_inner": read("feed_forward_length"),
        "layer_norm_epsilon": _decimal(read("attention.layer_norm_epsilon")),
        "activation_function": "gelu_new",
    }


def _rotary_config(source: GGUFFile, read: _Keys) -> dict[str, Any]:
    heads, hidden, length = read("attention.head_count"), read("embedding_length"), read("context_length")
    if not all(isinstance(size, int) and size > 0 for size in (heads, hidden, length)):
        raise InvalidInput(
            "model", f"heads {heads!r}, embedding_length {hidden!r} or context_length {length!r} is not > 0"
        )
    head_dim = read.values.get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if read.values.get(key, head_dim) != head_dim:
            raise InvalidInput("model", f"{read.prefix}{key} {read(key)!r} is not the head size {head_dim}")
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.values.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": read("feed_forward_length"),
        # No layer forgets here, so a window bounds the length.
        "max_position_embeddings": min(length, read.values.get("attention.sliding_window") or length),
        "rms_norm_eps": _decimal(read("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "rope_theta": _decimal(read.values.get("rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(source, read, length),
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
    }
    if read.prefix == "llama.":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in source.tensors
    return config


def _rope_scaling(source: GGUFFile, read: _Keys, length: int) -> dict[str, Any] | None:
    kind = read.values.get("rope.scaling.type", "none")
    if ROPE_FACTORS in source.tensors:
        # Divisors of the frequencies are what longrope's factors are; with `factor` 1 they are all it does.
        factors = source.read(ROPE_FACTORS).tolist()
        return {
            "rope_type": "longrope",
            "factor": 1.0,
            "original_max_position_embeddings": length,
            "short_factor": factors,
            "long_factor": factors,
        }
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InvalidInput("model", f"{read.prefix}rope.scaling.type {kind!r} is not supported: none, linear, yarn")
    scaling = {"rope_type": kind, "factor": _decimal(read("rope.scaling.factor"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = read("rope.scaling.original_context_length")
    return scaling


def _decimal(value: Any) -> Any:  # noqa: ANN401  a non-float is for from_hf to refuse
    """The number a float32 was written from: 1e-05, not 9.999999747378752e-06, and still the same float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
