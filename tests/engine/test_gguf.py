"""GGUF files converted and compared with the weights they were made from; models that are refused."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.checkpoints.gguf import convert, default_model
from engine.checkpoints.weights import Checkpoint
from engine.errors import InvalidInput
from engine.models.rotary import rotary_tables
from tests.engine.gguf_files import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    TOKENS,
    Weights,
    random_weights,
    write,
)

OURS = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "blocks.0.attention_norm.weight": "blk.0.attn_norm.weight",
    "blocks.0.feed_forward_norm.weight": "blk.0.ffn_norm.weight",
    "blocks.0.attention.q_proj.weight": "blk.0.attn_q.weight",
    "blocks.0.attention.k_proj.weight": "blk.0.attn_k.weight",
    "blocks.0.attention.v_proj.weight": "blk.0.attn_v.weight",
    "blocks.0.attention.o_proj.weight": "blk.0.attn_output.weight",
    "blocks.0.feed_forward.gate_proj.weight": "blk.0.ffn_gate.weight",
    "blocks.0.feed_forward.up_proj.weight": "blk.0.ffn_up.weight",
    "blocks.0.feed_forward.down_proj.weight": "blk.0.ffn_down.weight",
}


def read_back(path: Path, cache: Path) -> tuple[Checkpoint, dict[str, NDArray[np.float32]]]:
    checkpoint = Checkpoint.open(convert(path, cache), cache)
    return checkpoint, {name: tensor.numpy() for name, tensor in checkpoint.tensors()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_rotary_model_comes_back_as_it_was(tmp_path: Path, architecture: str) -> None:
    weights = random_weights(architecture)
    checkpoint, tensors = read_back(write(tmp_path / "m.gguf", architecture, weights), tmp_path / "cache")
    config = checkpoint.config
    assert (config.heads, config.kv_heads, config.head_dim, config.layers) == (HEADS, KV_HEADS, HEAD_DIM, 1)
    assert (config.norm_eps, config.rope_theta, config.max_length) == (1e-6, 5_000.0, 16)
    assert config.tied_head
    assert config.eos_token_ids == (0, 4)
    expected = {ours: weights[theirs] for ours, theirs in OURS.items()}
    if architecture == "qwen2":
        expected |= {f"blocks.0.attention.{x}_proj.bias": weights[f"blk.0.attn_{x}.bias"] for x in "qkv"}
    if architecture == "qwen3":
        expected |= {f"blocks.0.attention.{x}_norm.weight": weights[f"blk.0.attn_{x}_norm.weight"] for x in "qk"}
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(tensors[name], values), name


def test_a_biased_llama_has_its_biases_permuted_too(tmp_path: Path) -> None:
    weights = random_weights("llama")
    draw = np.random.default_rng(1)
    for name, size in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
        weights[f"blk.0.attn_{name}.bias"] = draw.standard_normal(size).astype(np.float32)
    weights["blk.0.attn_output.bias"] = draw.standard_normal(HIDDEN).astype(np.float32)
    _, tensors = read_back(write(tmp_path / "m.gguf", "llama", weights), tmp_path / "cache")
    for name in "qkv":
        assert np.array_equal(tensors[f"blocks.0.attention.{name}_proj.bias"], weights[f"blk.0.attn_{name}.bias"])


def test_a_gpt2_comes_back_as_it_was(tmp_path: Path) -> None:
    weights = random_weights("gpt2")
    weights["output.weight"] = weights["token_embd.weight"] + 1
    checkpoint, tensors = read_back(write(tmp_path / "m.gguf", "gpt2", weights), tmp_path / "cache")
    assert not checkpoint.config.tied_head
    for third, name in enumerate("qkv"):
        rows = slice(HIDDEN * third, HIDDEN * (third + 1))
        ours = f"blocks.0.attention.{name}_proj"
        assert np.array_equal(tensors[f"{ours}.weight"], weights["blk.0.attn_qkv.weight"][rows])
        assert np.array_equal(tensors[f"{ours}.bias"], weights["blk.0.attn_qkv.bias"][rows])
    for ours, theirs in (
        ("positions.weight", "position_embd.weight"),
        ("head.weight", "output.weight"),
        ("norm.bias", "output_norm.bias"),
        ("blocks.0.feed_forward.up_proj.weight", "blk.0.ffn_up.weight"),
        ("blocks.0.feed_forward.down_proj.bias", "blk.0.ffn_down.bias"),
        ("blocks.0.attention.o_proj.weight", "blk.0.attn_output.weight"),
    ):
        assert np.array_equal(tensors[ours], weights[theirs]), ours


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "BF16", "F16"])
def test_quantised_blocks_become_the_values_they_stand_for(tmp_path: Path, kind: str) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    weights = random_weights("qwen2")
    _, tensors = read_back(write(tmp_path / "m.gguf", "qwen2", weights, kind=quantised), tmp_path / "cache")
    name = "blk.0.ffn_down.weight"
    exact = gguf.dequantize(gguf.quantize(weights[name], quantised), quantised)
    assert np.array_equal(tensors["blocks.0.feed_forward.down_proj.weight"], exact)


def test_transformers_reads_the_same_directory(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = random_weights("llama")
    model = AutoModelForCausalLM.from_pretrained(convert(write(tmp_path / "m.gguf", "llama", weights), tmp_path))
    query = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(query.numpy(), weights["blk.0.attn_q.weight"])


# ------------------------------------------------------------------ rotary scalings


def test_llama_3_factors_divide_the_frequencies(tmp_path: Path) -> None:
    weights = random_weights("llama")
    weights["rope_freqs.weight"] = np.array([1.0, 2.0, 4.0, 8.0], dtype=np.float32)
    checkpoint, _ = read_back(write(tmp_path / "m.gguf", "llama", weights), tmp_path / "cache")
    assert checkpoint.config.max_length == 16
    plain, _ = read_back(write(tmp_path / "plain.gguf", "llama", random_weights("llama")), tmp_path / "cache")
    _, sines = rotary_tables(checkpoint.config)
    _, plain_sines = rotary_tables(plain.config)
    angles, plain_angles = torch.asin(sines[1]), torch.asin(plain_sines[1])  # position 1: below a quarter turn
    assert torch.allclose(angles * torch.tensor([1.0, 2.0, 4.0, 8.0]), plain_angles)


def test_linear_yarn_and_a_window(tmp_path: Path) -> None:
    def config_of(name: str, **keys: object) -> Any:
        dotted = {f"qwen2.{key.replace('__', '.')}": value for key, value in keys.items()}
        path = write(tmp_path / name, "qwen2", random_weights("qwen2"), dotted)
        return Checkpoint.open(convert(path, tmp_path / "cache")).config

    linear = config_of("l", rope__scaling__type="linear", rope__scaling__factor=2.0)
    assert (linear.rope_scaling.kind, linear.rope_scaling.factor) == ("linear", 2.0)
    yarn = config_of(
        "y", rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__original_context_length=8
    )
    assert (yarn.rope_scaling.kind, yarn.rope_scaling.original_length) == ("yarn", 8)
    assert config_of("w", attention__sliding_window=4).max_length == 4


# ------------------------------------------------------------------ the cache


def test_a_file_is_converted_once_and_keyed_by_its_content(tmp_path: Path) -> None:
    cache, said = tmp_path / "cache", list[str]()
    path = write(tmp_path / "m.gguf", "llama", random_weights("llama"))
    first = convert(path, cache, said.append)
    count = len(random_weights("llama"))
    assert said[:-1] == [f"converting m.gguf {number}/{count} tensors" for number in range(1, count + 1)]
    assert said[-1] == f"converted m.gguf into {first}"
    mark = first / "mark"
    mark.touch()
    assert convert(path, cache, said.append) == first
    assert len(said) == count + 1
    assert mark.exists()
    other = path.rename(tmp_path / "renamed.gguf")
    assert convert(other, cache) == first
    changed = write(tmp_path / "n.gguf", "llama", random_weights("llama") | {"output_norm.weight": np.ones(32, "f4")})
    assert convert(changed, cache) != first
    assert not list((cache / "models").glob(".partial-*"))


def test_conversions_that_race_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", random_weights("llama"))
    both, results = threading.Barrier(2, timeout=30), list[Path]()

    def meet(message: str) -> None:
        if message.startswith("converting"):
            both.wait()  # both have seen that the directory is not there

    def work() -> None:
        results.append(convert(path, tmp_path / "cache", meet))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert Checkpoint.open(results[0]).config.layers == 1
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1


def test_what_a_killed_conversion_left_is_removed_when_it_is_old(tmp_path: Path) -> None:

    models = tmp_path / "models"
    old, young = models / ".partial-old", models / ".partial-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    convert(write(tmp_path / "m.gguf", "llama", random_weights("llama")), tmp_path)
    assert not old.exists()
    assert young.exists()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba' in m.gguf is not known; known: llama, qwen2, qwen3, gpt2"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 2}, "tensor 'blk.1.attn_norm.weight' is missing"),
        ({"llama.embedding_length": 64, "llama.rope.dimension_count": 16}, "is [12, 32]; the metadata says [12, 64]"),
        ({"llama.attention.head_count": 0}, "is not > 0"),
        ({"llama.expert_count": 8}, "llama.expert_count 8 is not supported"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count 4 is not the head size 8"),
        ({"llama.rope.scaling.type": "su"}, "'su' is not supported: none, linear, yarn"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama' is not supported"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not known; known: default, gpt-2"),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, "not a list of different tokens"),
        ({"tokenizer.ggml.tokens": [*TOKENS, "more"]}, "token_type is not a list of 13 numbers"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merges is not a list of 'left right' texts"),
        ({"tokenizer.ggml.merges": ["x y"]}, "the merges do not fit the vocabulary"),
        ({"tokenizer.ggml.eos_token_id": 99}, "eos_token_id 99 is not a token"),
    ],
)
def test_a_model_that_is_not_understood_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "m.gguf", "llama", random_weights("llama"), keys)
    with pytest.raises(InvalidInput) as caught:
        convert(path, tmp_path / "cache")
    assert message in str(caught.value)
    assert not any((tmp_path / "cache" / "models").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.0.ffn_gate_exps.weight": np.ones((2, 32), "f4")}, "'blk.0.ffn_gate_exps.weight' is not part of a Llama"),
        ({"blk.0.ffn_up.weight": np.ones((32, 32), "f4")}, "'blk.0.ffn_up.weight' is [32, 32]; the metadata says [64"),
        ({"output_norm.weight": np.ones(32, "f8")}, "type F64 is not supported"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: Weights, message: str) -> None:
    path = write(tmp_path / "m.gguf", "llama", random_weights("llama") | change)
    with pytest.raises(InvalidInput) as caught:
        convert(path, tmp_path / "cache")
    assert message in str(caught.value)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    weights = random_weights("llama") | {"token_embd.weight": np.ones((8, HIDDEN), "f4")}
    with pytest.raises(InvalidInput, match="11 tokens do not fit 8 embeddings"):
        convert(write(tmp_path / "m.gguf", "llama", weights), tmp_path / "cache")


# ------------------------------------------------------------------ the real file


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_model_is_fetched_and_converted(cache: Path) -> None:
    path = default_model(cache)
    checkpoint = Checkpoint.open(convert(path, cache), cache)
    config = checkpoint.config
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.rope_theta, config.norm_eps, config.max_length) == (100_000.0, 1e-5, 8192)
    assert config.tied_head
    assert config.eos_token_ids == (2,)
    tensors = dict(checkpoint.tensors())
    assert sum(each.numel() for each in tensors.values()) == 134_515_008
    assert json.loads((checkpoint.path / "config.json").read_text())["vocab_size"] == 49_152
    source = gguf.GGUFReader(path)
    (norm,) = (each.data for each in source.tensors if each.name == "output_norm.weight")
    assert np.array_equal(tensors["norm.weight"].numpy(), norm)
    (value,) = (each for each in source.tensors if each.name == "blk.7.attn_v.weight")
    exact = gguf.dequantize(value.data, value.tensor_type)
    assert np.array_equal(tensors["blocks.7.attention.v_proj.weight"].numpy(), exact)
