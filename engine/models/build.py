"""From the text after NAME= to a packed model on its device."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.attention.base import Rotary
from engine.checkpoints.config import DecoderConfig
from engine.checkpoints.weights import Checkpoint, fetch_hub
from engine.compat.convert import read
from engine.errors import InvalidInput
from engine.layers import MultiHeadAttention, use_kernels
from engine.models.attention import AttentionModel, attention_spec
from engine.models.base import LoadedModel, LoadOptions, Progress
from engine.models.decoder import DecoderModel, decoder_spec
from engine.models.options import AttentionOptions
from engine.models.rotary import plain_tables, rotary_tables
from engine.parallel import Parallel, divide


def build_attention(name: str, spec: str, options: LoadOptions, progress: Progress) -> LoadedModel:
    """`attention:OPTION=VALUE,...`, each optional:

    hidden=512        width of query and output
    heads=8           of the query
    kv_heads=heads    of key and value: each serves heads / kv_heads of the query's
    head_dim=         width of one head; hidden / heads if not given
    kdim=hidden       width of key
    vdim=hidden       width of value
    bias=1            0: no projection has a bias
    add_bias_kv=0     1: one learnt key and value more, which every query sees
    add_zero_attn=0   1: one key and value of zeros more
    rotary=0          theta: queries and keys are rotated by their positions, as two halves of a head
    weights=FILE      safetensors in our names, torch's or MindSpore's (see engine.compat.convert)
    seed=0            without a file weights are drawn from it
    max_length=32768  positions of a session
    dtype=auto        of the weights

    Raises InvalidInput naming the option.
    """
    given = AttentionOptions.parse(spec)
    if given.dtype != "auto":
        options = dataclasses.replace(options, dtype=given.dtype)
    device, dtype = options.resolve()
    layer = _empty_layer(given, dtype)
    if given.weights is not None:
        progress(f"{name}: reading {given.weights}")
        tensors = _read_weights(given.weights, layer)
    else:
        tensors = _seeded_weights(layer, given.seed)
    fingerprint = _fingerprint(tensors, given)
    layer.load_state_dict({key: tensor.to(device, dtype) for key, tensor in tensors.items()}, assign=True)
    rotary = None
    if given.rotary:
        with torch.device(device):
            rotary = Rotary(*plain_tables(given.rotary, given.head_dim, given.max_length))
    described = attention_spec(
        name,
        layer,
        kv_dtype=options.kv_dtype,
        max_length=given.max_length,
        fingerprint=fingerprint,
        aligned=rotary is not None,
    )
    if options.parallel is not None:
        sizes = {"heads": layer.heads, "kv_heads": layer.kv_heads}
        divide("model_parallel", options.parallel.model.size, f"model {name}", **sizes)
        layer.shard(options.parallel)
    model = AttentionModel(described, layer, rotary)
    model.requires_grad_(False).eval()
    if options.kernels:
        use_kernels(model)
    model.pack()
    return LoadedModel(model, None)


def build_decoder(name: str, spec: str, options: LoadOptions, progress: Progress) -> LoadedModel:
    from engine.text import Tokenizer  # here: a model of tensors needs no tokenizer

    checkpoint = Checkpoint.open(_directory(spec, options.cache_dir, progress), options.cache_dir)
    device, dtype = options.resolve()
    if options.quantize == "int8" and not options.kernels:
        raise InvalidInput("quantize", "int8 needs the native kernels, else say none")
    model = load_decoder(
        name,
        checkpoint,
        device=device,
        dtype=dtype,
        kv_dtype=options.kv_dtype,
        parallel=options.parallel,
        kernels=options.kernels,
        int8=options.quantize == "int8",
        progress=progress,
    )
    return LoadedModel(model, Tokenizer.open(checkpoint), frozenset(checkpoint.config.eos_token_ids))


def load_decoder(
    name: str,
    checkpoint: Checkpoint,
    *,
    device: str,
    dtype: torch.dtype,
    kv_dtype: str,
    parallel: Parallel | None = None,
    kernels: bool = False,
    int8: bool = False,
    progress: Progress = lambda message: None,
) -> DecoderModel:
    """With `parallel`, this rank's share of it. With `kernels` its linears are the native kernels', `int8`: in 8 bits.
    Raises InvalidInput where the ranks cannot share it evenly."""
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
    if parallel is not None:
        sizes = {"heads": config.heads, "kv_heads": config.kv_heads, "intermediate_size": config.intermediate_size}
        divide("model_parallel", parallel.model.size, f"model {name}", **sizes)
        model.shard(parallel)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    tensors = {}
    for count, (key, tensor) in enumerate(checkpoint.tensors(), 1):
        progress(f"{name}: loading {config.architecture} {count}/{len(shapes) - config.tied_head} tensors")
        share = tensor if parallel is None else parallel.model.share_like(tensor, shapes[key])
        tensors[key] = share.to(device, dtype)
    if config.tied_head:
        tensors["head.weight"] = tensors["embed.weight"]
    model.load_state_dict(tensors, assign=True)
    del tensors  # so that packing a layer frees its plain copy at once
    model.requires_grad_(False).eval()
    if kernels:
        use_kernels(model, int8=int8)
    model.pack()
    return model


def _rotary(config: DecoderConfig, device: str) -> Rotary | None:
    if config.positions != "rotary":
        return None
    with torch.device(device):
        cos, sin = rotary_tables(config)
    return Rotary(cos, sin)


def _directory(spec: str, cache_dir: Path, progress: Progress) -> Path:
    from engine.checkpoints.gguf import convert, default_model  # likewise

    if spec == "default":
        return convert(default_model(cache_dir, progress), cache_dir, progress)
    if spec.startswith("hf:"):
        return fetch_hub(spec.removeprefix("hf:"), cache_dir, progress=progress)
    path = Path(spec).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return convert(path, cache_dir, progress)
    if path.is_dir():
        return path
    raise InvalidInput(
        "model", f"{spec!r} is neither a directory, a .gguf file, hf:ORG/NAME, attention:... nor `default`"
    )


def _empty_layer(given: AttentionOptions, dtype: torch.dtype) -> MultiHeadAttention:
    with torch.device("meta"):
        return MultiHeadAttention(
            given.hidden,
            given.heads,
            kv_heads=given.kv_heads,
            head_dim=given.head_dim,
            kdim=given.kdim,
            vdim=given.vdim,
            qkv_bias=given.bias,
            output_bias=given.bias,
            bias_kv=given.add_bias_kv,
            zero_attn=given.add_zero_attn,
            compute_dtype=dtype,
        )


def _read_weights(path: Path, layer: MultiHeadAttention) -> dict[str, Tensor]:
    tensors = read(path)
    expected = {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
    for key in sorted(expected.keys() | tensors.keys()):
        got = tuple(tensors[key].shape) if key in tensors else "nothing"
        if expected.get(key) != got:
            wanted = expected.get(key, "absent")
            raise InvalidInput("weights", f"{key} must be {wanted} by the other options, {path} has {got}")
    return tensors


def _seeded_weights(layer: MultiHeadAttention, seed: int) -> dict[str, Tensor]:
    """Weights normal with variance 1 / fan_in, so that outputs keep the inputs' scale; biases small and not zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, tensor in layer.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        tensors[key] = drawn * (tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else 0.02)
    return tensors


def _fingerprint(tensors: Mapping[str, Tensor], options: AttentionOptions) -> str:
    """Of the weights, and of what changes the numbers without one."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    if options.rotary:
        digest.update(f"rotary {options.rotary}\n".encode())
    if options.add_zero_attn:
        digest.update(b"add_zero_attn\n")
    return digest.hexdigest()
