"""config.json read as a DecoderConfig: every family, every refusal, and the rotary tables of transformers."""

import json
from typing import Any

import pytest
import torch

from engine.checkpoints.config import KNOWN_ARCHITECTURES, DecoderConfig, RopeScaling
from engine.errors import InvalidInput
from engine.models.rotary import rotary_tables

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
}


def llama(**changes: object) -> DecoderConfig:
    return DecoderConfig.from_hf({**LLAMA, **changes})


def family(name: str, **changes: object) -> DecoderConfig:
    return llama(architectures=[name], **changes)


def test_a_llama_is_read_in_full() -> None:
    assert llama() == DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=64,
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_length=128,
        norm="rms",
        norm_eps=1e-5,
        activation="silu_gate",
        positions="rotary",
        rope_theta=10_000.0,
        rope_scaling=None,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied_head=False,
        eos_token_ids=(2,),
        bos_token_id=1,
    )


def test_a_gpt2_is_read_in_full() -> None:
    config = DecoderConfig.from_hf(GPT2)
    assert (config.norm, config.activation, config.positions) == ("layer", "gelu_tanh", "learned")
    assert (config.kv_heads, config.head_dim, config.intermediate_size, config.max_length) == (4, 8, 128, 16)
    assert config.qkv_bias
    assert config.output_bias
    assert config.mlp_bias
    assert config.tied_head
    assert config.eos_token_ids == ()
    with pytest.raises(InvalidInput, match="learned positions"):
        rotary_tables(config)


def test_what_sets_the_families_apart() -> None:
    qwen2, qwen3 = family("Qwen2ForCausalLM"), family("Qwen3ForCausalLM", attention_bias=True, head_dim=None)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, False, 8)
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm, qwen3.head_dim) == (True, True, True, 128)
    biased = llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16)
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias, biased.tied_head) == (True, True, True, True)
    assert biased.head_dim == 16
    assert llama(num_key_value_heads=None).kv_heads == 4


def test_the_generation_config_decides_where_a_reply_ends() -> None:
    config = DecoderConfig.from_hf(LLAMA, {"eos_token_id": [5, 2, 99], "bos_token_id": None})
    assert config.eos_token_ids == (5, 2)  # 99 is outside the vocabulary
    assert config.bos_token_id == 1


@pytest.mark.parametrize(
    ("name", "changes", "length"),
    [
        ("MistralForCausalLM", {"sliding_window": 32}, 32),
        ("MistralForCausalLM", {"sliding_window": None}, 128),
        ("MistralForCausalLM", {"max_position_embeddings": 8192}, 4096),
        ("Qwen2ForCausalLM", {"sliding_window": 32}, 128),
        ("Qwen2ForCausalLM", {"sliding_window": 32, "use_sliding_window": True}, 128),
        ("Qwen2ForCausalLM", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, 32),
        ("Qwen3ForCausalLM", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 1}, 128),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            16,
        ),
        ("LlamaForCausalLM", {"sliding_window": 32}, 128),
    ],
)
def test_an_active_sliding_window_bounds_the_length(name: str, changes: dict[str, Any], length: int) -> None:
    assert family(name, **changes).max_length == length


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "architecture", "'BloomForCausalLM' is not known; known: LlamaFor"),
        ({"architectures": None}, "architecture", "None is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "quantized"),
        ({"hidden_size": None}, "hidden_size", "is missing"),
        ({"hidden_size": "32"}, "hidden_size", "is '32'; it must be an integer"),
        ({"hidden_size": True}, "hidden_size", "is True; it must be an integer"),
        ({"vocab_size": 0}, "vocab_size", "is 0; it must be an integer from 1"),
        ({"vocab_size": 2**40}, "vocab_size", f"is {2**40}"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers", "from 1 to 1024"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "is 3; it must divide num_attention_heads 4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads", "is 5; it must divide"),
        ({"head_dim": 7}, "head_dim", "is 7; rotary positions need an even one"),
        ({"hidden_act": "relu"}, "hidden_act", "is 'relu'; supported: silu"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "is nan"),
        ({"rms_norm_eps": 0}, "rms_norm_eps", "is 0; it must be a number above 0"),
        ({"attention_bias": "yes"}, "attention_bias", "is 'yes'; it must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id", "is '</s>'; it must be a token id"),
        ({"rope_theta": 1.0}, "rope_theta", "above 1"),
        ({"rope_scaling": [1]}, "rope_scaling", "must be an object"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_type", "is 'mrope'; supported: default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "factor", "is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "is 0.5; only 1.0"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor",
            "has 1 numbers; head_dim / 2 = 4",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
            "high_freq_factor",
            "above low_freq_factor",
        ),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused_by_key(changes: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        llama(**changes)
    assert caught.value.field == field
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"activation_function": "relu"}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"n_head": 5}, "n_head"),
        ({"n_positions": None}, "n_positions"),
    ],
)
def test_a_gpt2_variant_not_built_here_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        DecoderConfig.from_hf({**GPT2, **changes})
    assert caught.value.field == field


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, no original": {"rope_type": "yarn", "factor": 4.0},
    "yarn, factor from lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
        "mscale": 0.7,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.3, 1.9],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "longrope, factor from lengths": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.3, 1.9],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.3},
}


def oracle_tables(changes: dict[str, Any], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, head_dim] of transformers' own module for LLAMA with `changes`."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    keys = {key: value for key, value in json.loads(json.dumps({**LLAMA, **changes})).items() if key != "architectures"}
    rotary = LlamaRotaryEmbedding(LlamaConfig(**keys))
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_are_those_of_transformers(rope: str, spelling: str) -> None:
    theta: dict[str, Any] = {"rope_theta": 5_000.0}
    changes = (
        {spelling: {**ROPES[rope], **theta}} if spelling == "rope_parameters" else {spelling: ROPES[rope], **theta}
    )
    config = llama(**changes)
    cos, sin = rotary_tables(config)
    oracle_cos, oracle_sin = oracle_tables(changes, config.max_length)
    assert cos.shape == sin.shape == (config.max_length, 4)
    assert torch.equal(torch.cat((cos, cos), -1), oracle_cos)
    assert torch.equal(torch.cat((sin, sin), -1), oracle_sin)


def test_the_table_of_a_length_dependent_rope_ends_where_it_would_change() -> None:
    assert llama(rope_scaling=ROPES["longrope"]).max_length == 32
    assert llama(rope_scaling=ROPES["dynamic"]).max_length == 128
    assert llama(rope_scaling=ROPES["yarn"]).max_length == 128
    config = llama(rope_scaling=ROPES["linear"])
    assert rotary_tables(config, 5)[0].shape == (5, 4)


def test_the_old_spelling_of_the_rope_type_and_a_top_level_original_length() -> None:
    scaling = {"type": "yarn", "factor": 4.0}
    config = llama(rope_scaling=scaling, original_max_position_embeddings=16)
    assert isinstance(config.rope_scaling, RopeScaling)
    assert (config.rope_scaling.kind, config.rope_scaling.original_length) == ("yarn", 16)


def test_a_layer_that_does_not_attend_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"layer_types: is \['linear_attention'\]"):
        family("Qwen3ForCausalLM", use_sliding_window=True, layer_types=["linear_attention"])


def test_the_known_architectures_are_the_ones_read() -> None:
    for name in KNOWN_ARCHITECTURES:
        config = DecoderConfig.from_hf(GPT2) if name == "GPT2LMHeadModel" else family(name)
        assert config.architecture == name
