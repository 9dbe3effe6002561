"""What a decoder is made of, read from a Hugging Face `config.json`.

Five families, one description: what differs between them is data here and never an `if` in the forward pass.

    LlamaForCausalLM (SmolLM too), MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM     rotary, RMSNorm, SwiGLU
    GPT2LMHeadModel                                                   learned positions, LayerNorm, a plain GELU MLP

The defaults for absent keys are those of transformers 5.23 (`configuration_*.py`), the tests' oracle. `max_length` is
`max_position_embeddings`, made smaller where this engine would not be exact beyond:

- a sliding window (Mistral, Qwen): no layer forgets here, so nothing longer than the window is accepted;
- rope type `dynamic` or `longrope`: past the original context every earlier position's table would change with the
  length, which no cached key can follow. Inside it both are fixed tables (longrope: its short factors).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidInput

KNOWN_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GPT2LMHeadModel",
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")

# No model is near these; a config beyond them is a forgery that would ask for terabytes.
_MOST = {"num_hidden_layers": 1024, "n_layer": 1024}
_MOST_OTHERWISE = 2**24


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched; a field its `kind` does not use stays at its default."""

    kind: str  # "linear" | "llama3" | "yarn" | "longrope"
    factor: float = 1.0
    original_length: int = 0
    attention_factor: float = 1.0  # multiplies cos and sin
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # head_dim / 2 of them


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes are in elements, lengths in positions. `rope_theta` is 0 where positions are learned."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_length: int
    norm: str  # "rms" | "layer"
    norm_eps: float
    activation: str  # "silu_gate" | "gelu_tanh" | "gelu"
    positions: str  # "rotary" | "learned"
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool  # an RMSNorm per head on q and k, before rotary
    tied_head: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> "DecoderConfig":
        """Raises InvalidInput, its `field` the config key, for anything this engine would not compute exactly."""
        names = config.get("architectures") or [None]
        name = names[0] if isinstance(names, list) else names
        if name not in KNOWN_ARCHITECTURES:
            raise InvalidInput("architecture", f"{name!r} is not known; known: {', '.join(KNOWN_ARCHITECTURES)}")
        if config.get("quantization_config") is not None:
            raise InvalidInput("quantization_config", "quantized checkpoints are not supported; use a plain one")
        read = _Reader(config)
        build = _gpt2 if name == "GPT2LMHeadModel" else _rotary_family
        return build(name, read, *_special_tokens(read, generation_config or {}))


class _Reader:
    """Typed, bounded access to a parsed config.json; `null` is the same as absent."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._value(key, default)
        most = _MOST.get(key, _MOST_OTHERWISE)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InvalidInput(key, f"is {value!r}; it must be an integer from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, above: float = 0.0) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
            raise InvalidInput(key, f"is {value!r}; it must be a number above {above:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise InvalidInput(key, f"is {value!r}; it must be true or false")
        return value

    def choice(self, key: str, default: str, meanings: Mapping[str, str]) -> str:
        value = self._value(key, default)
        if not isinstance(value, str) or value not in meanings:
            raise InvalidInput(key, f"is {value!r}; supported: {', '.join(meanings)}")
        return meanings[value]

    def only(self, key: str, value: object) -> None:
        """Refuses a switch that would change the arithmetic to something not built here."""
        if self._value(key, value) != value:
            raise InvalidInput(key, f"is {self.config[key]!r}; only {value!r} is supported")

    def _value(self, key: str, default: object) -> Any:  # noqa: ANN401  a parsed JSON value: the callers check its type
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise InvalidInput(key, "is missing")
        return value


def _special_tokens(read: _Reader, generation: Mapping[str, Any]) -> tuple[tuple[int, ...], int | None]:
    """(eos ids, bos id): generation_config.json wins, as in generate(). An id outside the vocabulary is dropped:
    no model can emit it, and tiny test checkpoints carry their family's default."""
    vocab_size = read.integer("vocab_size")

    def ids(key: str) -> tuple[int, ...]:
        value = generation.get(key)
        if value is None:
            value = read.config.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in listed):
            raise InvalidInput(key, f"is {value!r}; it must be a token id or a list of them")
        return tuple(item for item in listed if 0 <= item < vocab_size)

    return ids("eos_token_id"), next(iter(ids("bos_token_id")), None)


def _gpt2(name: str, read: _Reader, eos: tuple[int, ...], bos: int | None) -> DecoderConfig:
    for key, value in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        read.only(key, value)
    hidden, heads, length = read.integer("n_embd"), read.integer("n_head"), read.integer("n_positions")
    if hidden % heads:
        raise InvalidInput("n_head", f"is {heads}; it must divide n_embd {hidden}")
    return DecoderConfig(
        architecture=name,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        layers=read.integer("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=read.integer("n_inner", 4 * hidden),
        max_length=length,
        norm="layer",
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        activation=read.choice(
            "activation_function",
            "gelu_new",
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        ),
        positions="learned",
        rope_theta=0.0,
        rope_scaling=None,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tied_head=read.flag("tie_word_embeddings", True),
        eos_token_ids=eos,
        bos_token_id=bos,
    )


def _rotary_family(name: str, read: _Reader, eos: tuple[int, ...], bos: int | None) -> DecoderConfig:
    heads = read.integer("num_attention_heads")
    # Only Llama's oldest files leave the key out; elsewhere the families' defaults are one model's sizes.
    kv_heads = read.integer("num_key_value_heads", heads if name == "LlamaForCausalLM" else None)
    if heads % kv_heads:
        raise InvalidInput("num_key_value_heads", f"is {kv_heads}; it must divide num_attention_heads {heads}")
    hidden, head_dim = read.integer("hidden_size"), _head_dim(name, read, heads)
    length = read.integer("max_position_embeddings")
    theta, scaling, exact_length = _rope(read, head_dim, length)
    bias = read.flag("attention_bias", False) if name in ("LlamaForCausalLM", "Qwen3ForCausalLM") else False
    return DecoderConfig(
        architecture=name,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        layers=read.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=read.integer("intermediate_size"),
        max_length=min(exact_length, _window(name, read) or exact_length),
        norm="rms",
        norm_eps=read.number("rms_norm_eps"),
        activation=read.choice("hidden_act", "silu", {"silu": "silu_gate", "swish": "silu_gate"}),
        positions="rotary",
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=bias or name == "Qwen2ForCausalLM",
        output_bias=bias,
        mlp_bias=read.flag("mlp_bias", False) if name == "LlamaForCausalLM" else False,
        qk_norm=name == "Qwen3ForCausalLM",
        tied_head=read.flag("tie_word_embeddings", False),
        eos_token_ids=eos,
        bos_token_id=bos,
    )


def _head_dim(name: str, read: _Reader, heads: int) -> int:
    hidden = read.integer("hidden_size")
    if read.config.get("head_dim") is None and name != "Qwen3ForCausalLM" and hidden % heads:
        raise InvalidInput("num_attention_heads", f"is {heads}; it must divide hidden_size {hidden}, or give head_dim")
    head_dim = read.integer("head_dim", 128 if name == "Qwen3ForCausalLM" else hidden // heads)
    if head_dim % 2:
        raise InvalidInput("head_dim", f"is {head_dim}; rotary positions need an even one")
    return head_dim


def _window(name: str, read: _Reader) -> int | None:
    """The sliding window, if any layer has one. Mistral's absent key means 4096, its null none, as in transformers."""
    if name == "MistralForCausalLM":
        if "sliding_window" in read.config and read.config["sliding_window"] is None:
            return None
        return read.integer("sliding_window", 4096)
    if name == "LlamaForCausalLM" or not read.flag("use_sliding_window", False):
        return None
    if read.config.get("sliding_window", 4096) is None:
        return None
    kinds = read.config.get("layer_types")
    if kinds is None:
        active = read.integer("max_window_layers", 28, least=0) < read.integer("num_hidden_layers")
    elif isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds):
        active = "sliding_attention" in kinds
    else:
        raise InvalidInput("layer_types", f"is {kinds!r}; supported: full_attention, sliding_attention")
    return read.integer("sliding_window", 4096) if active else None


def _rope(read: _Reader, head_dim: int, length: int) -> tuple[float, RopeScaling | None, int]:
    """(theta, scaling, the length up to which the table is fixed), from the spellings of transformers 4 and 5."""
    given = read.config.get("rope_scaling") or read.config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise InvalidInput("rope_scaling", f"is {given!r}; it must be an object")
    rope = _Reader(given)
    theta = rope.number("rope_theta", read.number("rope_theta", 10_000.0, above=1.0), above=1.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise InvalidInput("rope_type", f"is {kind!r}; supported: {', '.join(ROPE_TYPES)}")
    for reader in (read, rope):
        reader.only("partial_rotary_factor", 1.0)
    if kind in ("default", "dynamic"):
        return theta, None, length
    if kind == "linear":
        return theta, RopeScaling(kind, factor=rope.number("factor")), length
    # As transformers: a top-level key (Phi-3's spelling) wins over the nested one.
    original = read.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", length)
    )
    scaling = _SCALINGS[kind](rope, original, length / original)
    if kind != "longrope":
        return theta, scaling, length
    if len(scaling.short_factors) != head_dim // 2:
        raise InvalidInput("short_factor", f"has {len(scaling.short_factors)} numbers; head_dim / 2 = {head_dim // 2}")
    return theta, scaling, min(length, original)


def _llama3(rope: _Reader, original: int, ratio: float) -> RopeScaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise InvalidInput("high_freq_factor", f"is {high:g}; it must be above low_freq_factor {low:g}")
    return RopeScaling(
        "llama3", rope.number("factor"), original_length=original, low_freq_factor=low, high_freq_factor=high
    )


def _yarn(rope: _Reader, original: int, ratio: float) -> RopeScaling:
    factor = rope.number("factor", ratio)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = mscale(1.0)
    if rope.config.get("mscale") and rope.config.get("mscale_all_dim"):
        attention_factor = mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    return RopeScaling(
        "yarn",
        factor,
        original_length=original,
        attention_factor=rope.number("attention_factor", attention_factor),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


def _longrope(rope: _Reader, original: int, ratio: float) -> RopeScaling:
    factor = rope.number("factor", ratio)
    attention_factor = 1.0
    if factor > 1 and original > 1:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    short = rope.config.get("short_factor")
    if not isinstance(short, list) or not all(isinstance(x, int | float) and 0 < x < math.inf for x in short):
        raise InvalidInput("short_factor", f"is {short!r}; it must be a list of positive numbers")
    return RopeScaling(
        "longrope",
        factor,
        original_length=original,
        attention_factor=rope.number("attention_factor", attention_factor),
        short_factors=tuple(float(x) for x in short),
    )


_SCALINGS = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
