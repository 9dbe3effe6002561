"""From the text after NAME= to a packed model on its device."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.attention.base import Rotary
from engine.checkpoints.config import DecoderConfig
from engine.checkpoints.gguf import convert, default_model
from engine.checkpoints.weights import Checkpoint, fetch_hub
from engine.errors import InvalidInput
from engine.layers import MultiHeadAttention
from engine.models.attention import AttentionModel, attention_spec
from engine.models.base import LoadedModel, LoadOptions, Progress
from engine.models.decoder import DecoderModel, decoder_spec
from engine.models.rotary import rotary_tables
from engine.text import Tokenizer

ATTENTION_OPTIONS = {"hidden": "512", "heads": "8", "weights": "", "seed": "0", "max_length": "32768", "dtype": "auto"}


def build_attention(name: str, spec: str, options: LoadOptions, progress: Progress) -> LoadedModel:
    """`attention:hidden=512,heads=8,weights=FILE,seed=0,max_length=32768,dtype=auto`, each optional.

    The file is safetensors with {q,k,v,o}_proj.weight (hidden, hidden) stored [out, in] and .bias (hidden,); without
    one, weights are drawn from the seed.
    """
    given = _parse_options(spec)
    hidden, heads = _positive(given, "hidden"), _positive(given, "heads")
    if hidden % heads:
        raise InvalidInput("hidden", f"must be a multiple of heads, got {hidden} and {heads}")
    if given["dtype"] != "auto":
        options = dataclasses.replace(options, dtype=given["dtype"])
    device, dtype = options.resolve()
    with torch.device("meta"):
        layer = MultiHeadAttention(hidden, heads, compute_dtype=dtype)
    if given["weights"]:
        progress(f"{name}: reading {given['weights']}")
        tensors = _read_weights(Path(given["weights"]), layer)
    else:
        tensors = _seeded_weights(layer, _integer(given, "seed"))
    fingerprint = _digest(tensors)
    layer.load_state_dict({key: tensor.to(device, dtype) for key, tensor in tensors.items()}, assign=True)
    max_length = _positive(given, "max_length")
    model = AttentionModel(
        attention_spec(name, layer, kv_dtype=options.kv_dtype, max_length=max_length, fingerprint=fingerprint), layer
    )
    model.requires_grad_(False).eval()
    model.pack()
    return LoadedModel(model, None)


def build_decoder(name: str, spec: str, options: LoadOptions, progress: Progress) -> LoadedModel:
    checkpoint = Checkpoint.open(_directory(spec, options.cache_dir, progress), options.cache_dir)
    device, dtype = options.resolve()
    progress(f"{name}: loading {checkpoint.config.architecture}")
    model = load_decoder(name, checkpoint, device=device, dtype=dtype, kv_dtype=options.kv_dtype)
    return LoadedModel(model, Tokenizer.open(checkpoint), frozenset(checkpoint.config.eos_token_ids))


def load_decoder(name: str, checkpoint: Checkpoint, *, device: str, dtype: torch.dtype, kv_dtype: str) -> DecoderModel:
    config = checkpoint.config
    spec = decoder_spec(
        name,
        config,
        dtype=str(dtype).removeprefix("torch."),
        kv_dtype=kv_dtype,
        device=torch.device(device).type,
        fingerprint=checkpoint.fingerprint,
    )
    with torch.device("meta"):
        model = DecoderModel(spec, config, _rotary(config, device))
    tensors = {key: tensor.to(device, dtype) for key, tensor in checkpoint.tensors()}
    if config.tied_head:
        tensors["head.weight"] = tensors["embed.weight"]
    model.load_state_dict(tensors, assign=True)
    del tensors  # so that packing a layer frees its plain copy at once
    model.requires_grad_(False).eval()
    model.pack()
    return model


def _rotary(config: DecoderConfig, device: str) -> Rotary | None:
    if config.positions != "rotary":
        return None
    with torch.device(device):
        cos, sin = rotary_tables(config)
    return Rotary(cos, sin)


def _directory(spec: str, cache_dir: Path, progress: Progress) -> Path:
    if spec == "default":
        return convert(default_model(cache_dir, progress), cache_dir, progress)
    if spec.startswith("hf:"):
        return fetch_hub(spec.removeprefix("hf:"), cache_dir)
    path = Path(spec).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return convert(path, cache_dir, progress)
    if path.is_dir():
        return path
    raise InvalidInput(
        "model", f"{spec!r} is neither a directory, a .gguf file, hf:ORG/NAME, attention:... nor `default`"
    )


def _parse_options(spec: str) -> dict[str, str]:
    options = dict(ATTENTION_OPTIONS)
    for part in filter(None, spec.partition(":")[2].split(",")):
        key, equals, value = part.partition("=")
        if key not in options or not equals:
            raise InvalidInput("model", f"{part!r} is not one of {', '.join(f'{name}=' for name in options)}")
        options[key] = value
    return options


def _integer(options: Mapping[str, str], key: str) -> int:
    try:
        return int(options[key])
    except ValueError:
        raise InvalidInput(key, f"must be an integer, got {options[key]!r}") from None


def _positive(options: Mapping[str, str], key: str) -> int:
    value = _integer(options, key)
    if not 1 <= value <= 2**24:
        raise InvalidInput(key, f"must be 1 to {2**24}, got {value}")
    return value


def _read_weights(path: Path, layer: MultiHeadAttention) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidInput("weights", f"cannot read {path}: {error}") from error
    expected = {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
    for key in expected.keys() | tensors.keys():
        got = tuple(tensors[key].shape) if key in tensors else "nothing"
        if expected.get(key) != got:
            raise InvalidInput("weights", f"{key} must be {expected.get(key, 'absent')}, the file has {got}")
    return tensors


def _seeded_weights(layer: MultiHeadAttention, seed: int) -> dict[str, Tensor]:
    """Weights normal with variance 1 / fan_in, so that outputs keep the inputs' scale; biases small and not zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, tensor in layer.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        tensors[key] = drawn * (tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else 0.02)
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
