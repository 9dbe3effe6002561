"""A model directory as the Hub lays it out, opened without running a line of it.

    config.json            generation_config.json (optional)
    model.safetensors      or model.safetensors.index.json and its shards
    tokenizer.json         tokenizer_config.json, chat_template.jinja (both optional)

Everything is checked when the directory is opened, from the headers alone: every tensor the config implies must be
there with its shape, and none that nothing here would use. The data stays on disk until `Checkpoint.tensors` is walked.
Only safetensors is read: a pickle (`.bin`, `.pt`) runs code when it is loaded.

Tensor names are the engine's own, one set for all families; a linear weight is always [out, in]:

    embed.weight    positions.weight (GPT-2)    norm.*    head.weight (absent when tied to embed)
    blocks.{i}.attention_norm.*       blocks.{i}.attention.{q,k,v,o}_proj.*    blocks.{i}.attention.{q,k}_norm.weight
    blocks.{i}.feed_forward_norm.*    blocks.{i}.feed_forward.{gate,up,down}_proj.*    (GPT-2: up, down)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.checkpoints.config import DecoderConfig
from engine.errors import InvalidInput

_FLOATS = ("F32", "F16", "BF16")
_JSON_BYTES = 16 * 2**20  # an index of a very large model is 1 MB
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
)

# Our name to the file's, component by component: blocks.0.attention.q_proj.weight -> layers.0.self_attn.q_proj.weight
_ROTARY_NAMES = {
    "embed": "embed_tokens",
    "head": "lm_head",
    "blocks": "layers",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
}
_GPT2_NAMES = {
    "embed": "wte",
    "positions": "wpe",
    "norm": "ln_f",
    "head": "lm_head",
    "blocks": "h",
    "attention_norm": "ln_1",
    "attention": "attn",
    "feed_forward_norm": "ln_2",
    "feed_forward": "mlp",
    "q_proj": "c_attn",
    "k_proj": "c_attn",
    "v_proj": "c_attn",
    "o_proj": "c_proj",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
}
_FUSED = ("q_proj", "k_proj", "v_proj")  # the thirds of GPT-2's c_attn, in order
_PREFIX = re.compile(r"^(model|transformer)\.")
_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")  # computed, not learned


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one of our tensors lies: `third` of a fused [in, 3 * out] tensor, or all of `name`."""

    file: Path
    name: str
    transposed: bool
    third: int | None


@dataclass(frozen=True)
class Checkpoint:
    """An opened, checked model directory; `tokenizer_path` and `chat_template` are None where it has none."""

    path: Path
    config: DecoderConfig
    fingerprint: str
    tokenizer_path: Path | None
    chat_template: str | None
    special_tokens: Mapping[str, str]  # bos_token, eos_token, ...: what a chat template may name
    _sources: Mapping[str, _Source] = field(repr=False)

    @classmethod
    def open(cls, path: Path, cache_dir: Path | None = None) -> Checkpoint:
        """Raises InvalidInput for anything missing, misshapen or not to be used.

        `fingerprint` is the sha256 of config.json and of every weight file's content. With a `cache_dir` a file is
        hashed once and its digest kept (see `file_digest`); without one each start reads every byte.
        """

        config_path = path / "config.json"
        generation_path = path / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else None
        config = DecoderConfig.from_hf(read_json(config_path), generation)
        files = _weight_files(path)
        sources = _match(config, files)
        tokenizer_path = path / "tokenizer.json"
        tokenizer_config_path = path / "tokenizer_config.json"
        tokenizer_config = read_json(tokenizer_config_path) if tokenizer_config_path.exists() else {}
        return cls(
            path,
            config,
            _fingerprint(config_path, files, cache_dir),
            tokenizer_path if tokenizer_path.exists() else None,
            _chat_template(path, tokenizer_config),
            _special_tokens(tokenizer_config),
            sources,
        )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(our name, tensor) in a fixed order and in the file's dtype, mapped from disk one at a time."""
        for file in sorted({source.file for source in self._sources.values()}):
            with safe_open(file, framework="pt") as opened:
                for name, source in self._sources.items():
                    if source.file == file:
                        yield name, _read(opened, source)


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a decoder of this config has, under our names, linear weights as (out, in)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, hidden)}

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = (size,)
        if config.norm == "layer":
            shapes[f"{name}.bias"] = (size,)

    def linear(name: str, size_out: int, size_in: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (size_out, size_in)
        if bias:
            shapes[f"{name}.bias"] = (size_out,)

    if config.positions == "learned":
        shapes["positions.weight"] = (config.max_length, hidden)
    for i in range(config.layers):
        attention, feed_forward = f"blocks.{i}.attention", f"blocks.{i}.feed_forward"
        norm(f"{attention}_norm", hidden)
        linear(f"{attention}.q_proj", queries, hidden, config.qkv_bias)
        linear(f"{attention}.k_proj", keys, hidden, config.qkv_bias)
        linear(f"{attention}.v_proj", keys, hidden, config.qkv_bias)
        linear(f"{attention}.o_proj", hidden, queries, config.output_bias)
        if config.qk_norm:
            norm(f"{attention}.q_norm", config.head_dim)
            norm(f"{attention}.k_norm", config.head_dim)
        norm(f"{feed_forward}_norm", hidden)
        if config.activation == "silu_gate":
            linear(f"{feed_forward}.gate_proj", inner, hidden, config.mlp_bias)
        linear(f"{feed_forward}.up_proj", inner, hidden, config.mlp_bias)
        linear(f"{feed_forward}.down_proj", hidden, inner, config.mlp_bias)
    norm("norm", hidden)
    if not config.tied_head:
        shapes["head.weight"] = (config.vocab_size, hidden)
    return shapes


def _match(config: DecoderConfig, files: list[Path]) -> dict[str, _Source]:
    """Our names to their places in the files; raises InvalidInput for a missing, misshapen or unknown tensor."""
    found = _headers(files)
    sources: dict[str, _Source] = {}
    expected_shapes = stored_shapes(config)
    for name in tensor_shapes(config):
        stored, transposed, third = _stored_as(config, name)
        if stored not in found:
            raise InvalidInput("model", f"tensor {stored!r} is missing")
        file, full_name, stored_shape, dtype = found[stored]
        expected = expected_shapes[stored]
        if stored_shape != expected:
            raise InvalidInput(
                "model", f"tensor {full_name!r} is {list(stored_shape)}; config.json says {list(expected)}"
            )
        if dtype not in _FLOATS:
            raise InvalidInput("model", f"tensor {full_name!r} is {dtype}; supported: {', '.join(_FLOATS)}")
        sources[name] = _Source(file, full_name, transposed, third)
    used = {source.name for source in sources.values()}
    for stored, (_, full_name, _, _) in found.items():
        tied_twice = config.tied_head and stored == "lm_head.weight"
        if full_name not in used and not tied_twice and not _BUFFER.search(stored):
            raise InvalidInput("model", f"tensor {full_name!r} is not part of a {config.architecture}")
    return sources


def stored_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a file of this config must hold, by the Hub's names without their prefix, in the Hub's layout."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        stored, transposed, third = _stored_as(config, name)
        whole = shape if third is None else (3 * shape[0], *shape[1:])
        shapes[stored] = whole[::-1] if transposed else whole
    return shapes


def _stored_as(config: DecoderConfig, name: str) -> tuple[str, bool, int | None]:
    """(name in the file without its prefix, whether it is stored [in, out], which third of a fused tensor it is)."""
    parts = name.split(".")
    if config.architecture != "GPT2LMHeadModel":
        return ".".join(_ROTARY_NAMES.get(part, part) for part in parts), False, None
    module = parts[-2]
    stored = ".".join(_GPT2_NAMES.get(part, part) for part in parts)
    # GPT-2's linear layers are Conv1D, which stores [in, out].
    return (
        stored,
        module.endswith("_proj") and parts[-1] == "weight",
        _FUSED.index(module) if module in _FUSED else None,
    )


def _headers(files: list[Path]) -> dict[str, tuple[Path, str, tuple[int, ...], str]]:
    """Every stored tensor without its prefix: (file, full name, shape, dtype). Reads no tensor data."""
    found: dict[str, tuple[Path, str, tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for full_name in opened.keys():  # noqa: SIM118  not a mapping
                    name = _PREFIX.sub("", full_name)
                    if name in found:
                        raise InvalidInput(
                            "model", f"tensor {full_name!r} is there twice: {found[name][0].name}, {file.name}"
                        )
                    header = opened.get_slice(full_name)
                    found[name] = (file, full_name, tuple(header.get_shape()), header.get_dtype())
        except (SafetensorError, OSError) as error:
            raise InvalidInput("model", f"{file.name} is not a whole safetensors file: {error}") from error
    return found


def _read(opened: Any, source: _Source) -> torch.Tensor:  # noqa: ANN401  safe_open is not typed
    if source.third is None:
        tensor: torch.Tensor = opened.get_tensor(source.name)
    else:
        part = opened.get_slice(source.name)
        size = part.get_shape()[-1] // 3
        columns = slice(source.third * size, (source.third + 1) * size)
        tensor = part[:, columns] if source.transposed else part[columns]
    return tensor.t().contiguous() if source.transposed else tensor


def _weight_files(path: Path) -> list[Path]:
    """The single file, or the index's shards; a shard's name may not leave the directory."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise InvalidInput("model", f"{index.name} has no weight_map of file names")
        files = [path / name for name in sorted(set(names.values()))]
        for file in files:
            if file.name != os.path.relpath(file, path) or not file.is_file():
                raise InvalidInput("model", f"{index.name} names {file.name!r}, which is not in {path}")
        return files
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        raise InvalidInput(
            "model",
            f"{path} holds only pickled weights, which run code when loaded; convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET) writes safetensors",
        )
    raise InvalidInput("model", f"{path} has no model.safetensors and no model.safetensors.index.json")


def _fingerprint(config_path: Path, files: list[Path], cache_dir: Path | None) -> str:
    total = hashlib.sha256()
    for file in (config_path, *files):
        total.update(f"{file.name} {file_digest(file, cache_dir)}\n".encode())
    return total.hexdigest()


def file_digest(path: Path, cache_dir: Path | None = None) -> str:
    """sha256 of the content, in hex; about 1 s per GB.

    With a `cache_dir` the digest is kept in `cache_dir/digests/`, keyed by path, size, mtime and inode: a warm start
    reads no data, and any ordinary replacement of the file is seen.
    """
    if cache_dir is None:
        return _hash(path)
    stat = path.stat()
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    kept = cache_dir / "digests" / hashlib.sha256(state.encode()).hexdigest()
    with contextlib.suppress(OSError):  # it is not there, or another user's
        digest = kept.read_text()
        if re.fullmatch("[0-9a-f]{64}", digest):
            return digest
    digest = _hash(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written to only costs the time to read it again
        write_atomically(kept, digest.encode())
    return digest


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old file or the whole new one, whoever else writes it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size; raises InvalidInput for anything else."""
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise InvalidInput("model", f"{path} is larger than {_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidInput("model", f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput("model", f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInput("model", f"{path} is not a JSON object")
    return value


def _chat_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, whose value is a text or a list of named texts."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidInput("model", f"{file} cannot be read: {error}") from error
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise InvalidInput("model", "tokenizer_config.json: chat_template is neither a text nor a list of named texts")
    return template


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Each is spelled as a text or as an added-token object with its `content`."""
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value = tokenizer_config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def fetch_hub(
    repo: str,
    cache_dir: Path,
    download: Callable[..., str] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """The directory of `ORG/NAME` or `ORG/NAME@REVISION`, fetched from the Hugging Face Hub when it is not there yet.

    Only the files this module reads are fetched: never code, never a pickle. `download` is
    `huggingface_hub.snapshot_download` unless a test gives another. Raises InvalidInput when it cannot be fetched.
    """
    match = re.fullmatch(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([\w./-]+))?", repo)
    if match is None:
        raise InvalidInput("model", f"hf:{repo} is not hf:ORG/NAME or hf:ORG/NAME@REVISION")
    if download is None:
        from huggingface_hub import snapshot_download  # slow to import, and only needed here
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # the service tells what goes on by itself
        download = snapshot_download
    progress(f"fetching {repo} from the Hugging Face Hub")
    try:
        found = download(match[1], revision=match[2], cache_dir=str(cache_dir / "hub"), allow_patterns=list(_HUB_FILES))
    except Exception as error:  # the Hub's client raises its own errors, those of its HTTP library, and OSError
        reason = str(error).strip().split("\n")[0]
        raise InvalidInput(
            "model",
            f"hf:{repo} could not be fetched ({type(error).__name__}: {reason}); check the name and the network, or "
            "download it elsewhere and give its directory",
        ) from error
    return Path(found)
