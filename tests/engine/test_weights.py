"""A Hugging Face directory read as a Checkpoint: what transformers saves, and what must be refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoints.weights import Checkpoint, fetch_hub, file_digest, tensor_shapes, write_atomically
from engine.errors import InvalidInput

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
GPT2_SIZES: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama, biased and tied": (
        "LlamaConfig",
        {**SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", {**SIZES, "head_dim": 8}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", GPT2_SIZES),
    "gpt2, untied": ("GPT2Config", {**GPT2_SIZES, "n_inner": 20, "tie_word_embeddings": False}),
}


def save(directory: Path, family: str, shard: str = "1GB") -> dict[str, torch.Tensor]:
    """A random model of `family` as transformers saves it, and its weights by transformers' names."""
    import transformers

    class_name, sizes = FAMILIES[family]
    config = getattr(transformers, class_name)(**sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # a bias of zeros would hide a swap
    model.save_pretrained(directory, max_shard_size=shard)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def llama_view(weights: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    layer = f"model.layers.{i}"
    return {
        f"blocks.{i}.attention_norm.weight": weights[f"{layer}.input_layernorm.weight"],
        f"blocks.{i}.attention.q_proj.weight": weights[f"{layer}.self_attn.q_proj.weight"],
        f"blocks.{i}.attention.k_proj.weight": weights[f"{layer}.self_attn.k_proj.weight"],
        f"blocks.{i}.attention.v_proj.weight": weights[f"{layer}.self_attn.v_proj.weight"],
        f"blocks.{i}.attention.o_proj.weight": weights[f"{layer}.self_attn.o_proj.weight"],
        f"blocks.{i}.feed_forward_norm.weight": weights[f"{layer}.post_attention_layernorm.weight"],
        f"blocks.{i}.feed_forward.gate_proj.weight": weights[f"{layer}.mlp.gate_proj.weight"],
        f"blocks.{i}.feed_forward.up_proj.weight": weights[f"{layer}.mlp.up_proj.weight"],
        f"blocks.{i}.feed_forward.down_proj.weight": weights[f"{layer}.mlp.down_proj.weight"],
    }


def gpt2_view(weights: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    layer = f"transformer.h.{i}"
    view: dict[str, torch.Tensor] = {}
    for third, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(16 * third, 16 * third + 16)
        view[f"blocks.{i}.attention.{name}.weight"] = weights[f"{layer}.attn.c_attn.weight"].t()[rows]
        view[f"blocks.{i}.attention.{name}.bias"] = weights[f"{layer}.attn.c_attn.bias"][rows]
    for ours, theirs in (
        ("attention.o_proj", "attn.c_proj"),
        ("feed_forward.up_proj", "mlp.c_fc"),
        ("feed_forward.down_proj", "mlp.c_proj"),
    ):
        view[f"blocks.{i}.{ours}.weight"] = weights[f"{layer}.{theirs}.weight"].t()
        view[f"blocks.{i}.{ours}.bias"] = weights[f"{layer}.{theirs}.bias"]
    for ours, theirs in (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2")):
        view[f"blocks.{i}.{ours}.weight"] = weights[f"{layer}.{theirs}.weight"]
        view[f"blocks.{i}.{ours}.bias"] = weights[f"{layer}.{theirs}.bias"]
    return view


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family_is_there_with_its_value(tmp_path: Path, family: str) -> None:
    weights = save(tmp_path, family)
    checkpoint = Checkpoint.open(tmp_path)
    tensors = dict(checkpoint.tensors())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_shapes(checkpoint.config)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    gpt2 = family.startswith("gpt2")
    root = "transformer" if gpt2 else "model"
    expected = {"embed.weight": weights[f"{root}.wte.weight" if gpt2 else f"{root}.embed_tokens.weight"]}
    expected["norm.weight"] = weights[f"{root}.ln_f.weight" if gpt2 else f"{root}.norm.weight"]
    if gpt2:
        expected["positions.weight"] = weights[f"{root}.wpe.weight"]
    if not checkpoint.config.tied_head:
        expected["head.weight"] = weights["lm_head.weight"]
    for i in range(2):
        expected |= (gpt2_view if gpt2 else llama_view)(weights, i)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_biases_and_head_norms_go_by_the_same_rule(tmp_path: Path) -> None:
    biased, normed = tmp_path / "biased", tmp_path / "normed"
    weights = save(biased, "llama, biased and tied")
    tensors = dict(Checkpoint.open(biased).tensors())
    assert torch.equal(tensors["blocks.1.attention.o_proj.bias"], weights["model.layers.1.self_attn.o_proj.bias"])
    assert torch.equal(tensors["blocks.1.feed_forward.up_proj.bias"], weights["model.layers.1.mlp.up_proj.bias"])
    assert "head.weight" not in tensors
    weights = save(normed, "qwen3")
    tensors = dict(Checkpoint.open(normed).tensors())
    assert torch.equal(tensors["blocks.0.attention.q_norm.weight"], weights["model.layers.0.self_attn.q_norm.weight"])


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    weights = save(tmp_path, "llama", shard="4KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tensors = dict(Checkpoint.open(tmp_path).tensors())
    assert torch.equal(tensors["norm.weight"], weights["model.norm.weight"])
    assert len(tensors) == len(weights)


# ------------------------------------------------------------------ refusals

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
NAMES = {
    "embed_tokens.weight": (8, 4),
    "layers.0.input_layernorm.weight": (4,),
    "layers.0.self_attn.q_proj.weight": (4, 4),
    "layers.0.self_attn.k_proj.weight": (4, 4),
    "layers.0.self_attn.v_proj.weight": (4, 4),
    "layers.0.self_attn.o_proj.weight": (4, 4),
    "layers.0.post_attention_layernorm.weight": (4,),
    "layers.0.mlp.gate_proj.weight": (6, 4),
    "layers.0.mlp.up_proj.weight": (6, 4),
    "layers.0.mlp.down_proj.weight": (4, 6),
    "norm.weight": (4,),
}
Change = Callable[[dict[str, torch.Tensor]], None]


def write_small(directory: Path, change: Change = lambda tensors: None, prefix: str = "model.") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SMALL))
    tensors = {prefix + name: torch.ones(shape) for name, shape in NAMES.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def without(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def with_tensor(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm.weight"), "tensor 'norm.weight' is missing"),
        (without("model.layers.0.mlp.up_proj.weight"), "tensor 'layers.0.mlp.up_proj.weight' is missing"),
        (
            with_tensor("model.norm.weight", torch.ones(5)),
            "tensor 'model.norm.weight' is [5]; config.json says [4]",
        ),
        (
            with_tensor("model.layers.0.mlp.down_proj.weight", torch.ones(6, 4)),
            "'model.layers.0.mlp.down_proj.weight' is [6, 4]; config.json says [4, 6]",
        ),
        (with_tensor("model.norm.weight", torch.ones(4, dtype=torch.int8)), "is I8; supported: F32, F16, BF16"),
        (with_tensor("model.layers.1.mlp.up_proj.weight", torch.ones(6, 4)), "is not part of a LlamaForCausalLM"),
        (with_tensor("model.layers.0.self_attn.q_proj.bias", torch.ones(4)), "is not part of a LlamaForCausalLM"),
        (with_tensor("norm.weight", torch.ones(4)), "is there twice"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Checkpoint.open(write_small(tmp_path, change))
    assert message in str(caught.value)


def test_known_buffers_a_tied_head_and_a_bare_prefix_are_accepted(tmp_path: Path) -> None:
    def extras(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.ones(8, 4)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(1)

    checkpoint = Checkpoint.open(write_small(tmp_path, extras, prefix=""))
    assert set(dict(checkpoint.tensors())) == set(tensor_shapes(checkpoint.config))


def test_a_half_precision_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    write_small(tmp_path, with_tensor("model.norm.weight", torch.full((4,), 1.5, dtype=torch.bfloat16)))
    norm = dict(Checkpoint.open(tmp_path).tensors())["norm.weight"]
    assert norm.dtype == torch.bfloat16
    assert norm.tolist() == [1.5] * 4


def test_pickled_weights_are_refused_with_the_fix(tmp_path: Path) -> None:
    write_small(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"only pickled weights.*save_pretrained"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InvalidInput, match=r"has no model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b'{"model.norm.weight": 1}'])
def test_a_broken_weight_file_is_refused(tmp_path: Path, content: bytes) -> None:
    write_small(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"model\.safetensors is not a whole safetensors file"):
        Checkpoint.open(tmp_path)


def test_a_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    file = write_small(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(InvalidInput, match="not a whole safetensors file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"{", "is not JSON"), (b"[1]", "is not a JSON object"), (b"[" * 99999, "is not JSON")],
)
def test_a_broken_config_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"norm.weight": 3}}, "has no weight_map"),
        ({"weight_map": {"norm.weight": "absent.safetensors"}}, "names 'absent.safetensors', which is not in"),
        ({"weight_map": {"norm.weight": "../model.safetensors"}}, "names 'model.safetensors', which is not in"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(tmp_path: Path, index: dict[str, Any], message: str) -> None:
    inside = write_small(tmp_path / "inside")
    (inside / "model.safetensors").rename(tmp_path / "model.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidInput, match=message):
        Checkpoint.open(inside)


# ------------------------------------------------------------------ text files, fingerprint, Hub


def test_the_template_and_special_tokens_are_found_in_either_spelling(tmp_path: Path) -> None:
    write_small(tmp_path)
    bare = Checkpoint.open(tmp_path)
    assert (bare.tokenizer_path, bare.chat_template, bare.special_tokens) == (None, None, {})
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    content = {"chat_template": templates, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer.json").write_text("{}")
    listed = Checkpoint.open(tmp_path)
    assert listed.chat_template == "yes"
    assert listed.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert listed.tokenizer_path == tmp_path / "tokenizer.json"
    (tmp_path / "chat_template.jinja").write_text("the file wins")
    assert Checkpoint.open(tmp_path).chat_template == "the file wins"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match="cannot be read"):
        Checkpoint.open(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(InvalidInput, match="neither a text nor a list"):
        Checkpoint.open(tmp_path)


def test_the_fingerprint_follows_config_and_content_and_nothing_else(tmp_path: Path) -> None:
    first = Checkpoint.open(write_small(tmp_path / "first")).fingerprint
    assert Checkpoint.open(write_small(tmp_path / "second")).fingerprint == first
    assert Checkpoint.open(tmp_path / "first", cache_dir=tmp_path / "cache").fingerprint == first
    assert len(first) == 64
    last_bit = torch.tensor([1.0, 1.0, 1.0, 1.0 + 2**-23])
    changed = write_small(tmp_path / "second", with_tensor("model.norm.weight", last_bit))
    assert Checkpoint.open(changed).fingerprint != first
    config = tmp_path / "first" / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-06"))
    assert Checkpoint.open(tmp_path / "first").fingerprint != first


def test_a_digest_is_kept_until_the_file_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "file", tmp_path / "cache"
    file.write_bytes(b"abc")
    digest = file_digest(file, cache)
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (kept,) = (cache / "digests").iterdir()
    kept.write_text("0" * 64)
    assert file_digest(file, cache) == "0" * 64  # from the cache: the content was not read again
    kept.write_text("torn")
    assert file_digest(file, cache) == digest
    write_atomically(file, b"abd")
    assert file_digest(file, cache) not in (digest, "0" * 64)


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path: Path) -> None:
    file, cache = tmp_path / "file", tmp_path / "cache"
    file.write_bytes(b"abc")
    cache.write_text("a file where the folder should be")
    assert file_digest(file, cache) == file_digest(file)


def test_a_digest_that_cannot_be_read_is_worked_out(tmp_path: Path) -> None:
    file, cache = tmp_path / "file", tmp_path / "cache"
    file.write_bytes(b"abc")
    digest = file_digest(file, cache)
    (kept,) = (cache / "digests").iterdir()
    kept.unlink()
    kept.mkdir()
    assert file_digest(file, cache) == digest


def test_the_hub_is_asked_for_safe_files_only(tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path / "snapshot")

    assert fetch_hub("ORG/NAME@v1.0", tmp_path, download) == tmp_path / "snapshot"
    assert (asked["repo"], asked["revision"], asked["cache_dir"]) == ("ORG/NAME", "v1.0", str(tmp_path / "hub"))
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])


def test_a_failed_fetch_says_what_to_do(tmp_path: Path) -> None:
    def offline(repo: str, **options: Any) -> str:
        raise OSError("no route to host\nand a long trace")

    with pytest.raises(InvalidInput, match=r"hf:ORG/NAME could not be fetched \(OSError: no route to host\); check"):
        fetch_hub("ORG/NAME", tmp_path, offline)


@pytest.mark.parametrize("repo", ["NAME", "ORG/NAME/MORE", "../..", "ORG/", "ORG/NAME@", "a b/c"])
def test_what_is_not_a_repository_name_is_not_asked_for(tmp_path: Path, repo: str) -> None:
    def never(repo: str, **options: Any) -> str:
        raise AssertionError(repo)

    with pytest.raises(InvalidInput, match="is not hf:ORG/NAME"):
        fetch_hub(repo, tmp_path, never)
