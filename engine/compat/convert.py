"""Weights of one attention layer between torch's names, MindSpore's and ours; E is the width of all heads together.

    ours                          torch                                        MindSpore
    q_proj.weight (E, hidden)     in_proj_weight (3E, E), or q_proj_weight     dense1.weight (E, E)
    k_proj.weight (KV, kdim)          k_proj_weight (E, kdim)                  dense2.weight (E, E)
    v_proj.weight (KV, vdim)          v_proj_weight (E, vdim)                  dense3.weight (E, E)
    o_proj.weight (hidden, E)     out_proj.weight (E, E)                       projection.weight (E, E)
    {q,k,v}_proj.bias             in_proj_bias (3E,)                           dense1.bias ... (E,)
    o_proj.bias (hidden,)         out_proj.bias (E,)                           projection.bias (E,)
    bias_k, bias_v (KV,)          bias_k, bias_v (1, 1, E)                     none

Weights are stored [out, in], but MindSpore's projection.weight is stored [in, out]. Nothing is copied or cast that need
not be: what is returned may be a view of what was given, and gradients flow.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import InvalidInput

Weights = Mapping[str, Tensor]
Shapes = dict[str, tuple[int | None, ...]]  # None: any size

QKV = ("q_proj", "k_proj", "v_proj")
DENSE = ("dense1", "dense2", "dense3")


def from_torch(weights: Weights) -> dict[str, Tensor]:
    """The state dict of a torch.nn.MultiheadAttention, in our names. Raises InvalidInput naming the weight."""
    size = _size(weights, "out_proj.weight", 0)
    one: Shapes = {"in_proj_weight": (3 * size, size)}
    three: Shapes = {f"{name}_weight": (size, size if name == "q_proj" else None) for name in QKV}
    biases: Shapes = {"in_proj_bias": (3 * size,), "out_proj.bias": (size,)}
    extra: Shapes = {"bias_k": (1, 1, size), "bias_v": (1, 1, size)}
    fused = "in_proj_weight" in weights
    required: Shapes = {"out_proj.weight": (size, size), **(one if fused else three)}
    _check(weights, "torch", required, biases, extra)
    projections = weights["in_proj_weight"].chunk(3) if fused else [weights[name] for name in three]
    ours = {f"{name}.weight": tensor for name, tensor in zip(QKV, projections, strict=True)}
    ours["o_proj.weight"] = weights["out_proj.weight"]
    if "in_proj_bias" in weights:
        ours |= {f"{name}.bias": part for name, part in zip(QKV, weights["in_proj_bias"].chunk(3), strict=True)}
        ours["o_proj.bias"] = weights["out_proj.bias"]
    return ours | {name: weights[name].flatten() for name in extra if name in weights}


def to_torch(weights: Weights) -> dict[str, Tensor]:
    """The state dict of the torch.nn.MultiheadAttention that computes the same. Raises InvalidInput naming what torch's
    layer cannot hold: grouped heads, heads whose widths do not add up to hidden, biases on some projections only."""
    size = _size(weights, "o_proj.weight", 0)
    required: Shapes = {
        "q_proj.weight": (size, size),
        "k_proj.weight": (size, None),
        "v_proj.weight": (size, None),
        "o_proj.weight": (size, size),
    }
    biases: Shapes = {f"{name}.bias": (size,) for name in (*QKV, "o_proj")}
    extra: Shapes = {"bias_k": (size,), "bias_v": (size,)}
    _check(weights, "torch", required, biases, extra)
    projections = [weights[f"{name}.weight"] for name in QKV]
    if all(tensor.shape == (size, size) for tensor in projections):
        theirs = {"in_proj_weight": torch.cat(projections)}
    else:
        theirs = {f"{name}_weight": tensor for name, tensor in zip(QKV, projections, strict=True)}
    theirs["out_proj.weight"] = weights["o_proj.weight"]
    if "o_proj.bias" in weights:
        theirs["in_proj_bias"] = torch.cat([weights[f"{name}.bias"] for name in QKV])
        theirs["out_proj.bias"] = weights["o_proj.bias"]
    return theirs | {name: weights[name].view(1, 1, -1) for name in extra if name in weights}


def from_mindspore(weights: Weights) -> dict[str, Tensor]:
    """The parameters of a mindspore.parallel.nn.MultiHeadAttention, in our names. Raises InvalidInput, by name."""
    size = _size(weights, "projection.weight", 1)
    required: Shapes = {f"{name}.weight": (size, size) for name in (*DENSE, "projection")}
    required |= {f"{name}.bias": (size,) for name in (*DENSE, "projection")}
    _check(weights, "MindSpore", required)
    ours = {
        f"{name}.{part}": weights[f"{dense}.{part}"]
        for name, dense in zip(QKV, DENSE, strict=True)
        for part in ("weight", "bias")
    }
    return ours | {"o_proj.weight": weights["projection.weight"].T, "o_proj.bias": weights["projection.bias"]}


def to_mindspore(weights: Weights) -> dict[str, Tensor]:
    """The parameters of the mindspore.parallel.nn.MultiHeadAttention that computes the same. Raises InvalidInput naming
    what it cannot hold: no bias, bias_k and bias_v, kdim, vdim, grouped heads."""
    size = _size(weights, "o_proj.weight", 0)
    required: Shapes = {f"{name}.weight": (size, size) for name in (*QKV, "o_proj")}
    required |= {f"{name}.bias": (size,) for name in (*QKV, "o_proj")}
    _check(weights, "MindSpore", required)
    theirs = {
        f"{dense}.{part}": weights[f"{name}.{part}"]
        for name, dense in zip(QKV, DENSE, strict=True)
        for part in ("weight", "bias")
    }
    return theirs | {"projection.weight": weights["o_proj.weight"].T, "projection.bias": weights["o_proj.bias"]}


def from_ours(weights: Weights) -> dict[str, Tensor]:
    """Our own names, checked: shapes that fit each other. Raises InvalidInput naming the weight."""
    hidden, size = _size(weights, "o_proj.weight", 0), _size(weights, "o_proj.weight", 1)
    kv = _size(weights, "k_proj.weight", 0)
    required: Shapes = {
        "q_proj.weight": (size, hidden),
        "k_proj.weight": (kv, None),
        "v_proj.weight": (kv, None),
        "o_proj.weight": (hidden, size),
    }
    biases: Shapes = {"q_proj.bias": (size,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
    _check(weights, "keypast", required, biases, {"o_proj.bias": (hidden,)}, {"bias_k": (kv,), "bias_v": (kv,)})
    return dict(weights)


# The weight that tells whose names a file has.
_NAMINGS: dict[str, Callable[[Weights], dict[str, Tensor]]] = {
    "o_proj.weight": from_ours,
    "out_proj.weight": from_torch,
    "projection.weight": from_mindspore,
}


def read(path: Path) -> dict[str, Tensor]:
    """A safetensors file in any of the three namings, in our names; a prefix that all its names share is dropped.

    Raises InvalidInput (`weights`) naming the file and what in it is missing, unknown or of the wrong shape.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidInput("weights", f"cannot read {path}: {error}") from error
    found = [(name, last) for name in tensors for last in _NAMINGS if f".{name}".endswith(f".{last}")]
    if len(found) != 1:
        raise InvalidInput(
            "weights",
            f"{path} must hold one layer, in keypast's names (q_proj.weight), torch's (in_proj_weight) or MindSpore's"
            f" (dense1.weight); it has {_listed(tensors)}",
        )
    name, last = found[0]
    prefix = name.removesuffix(last)
    try:
        return _NAMINGS[last]({key.removeprefix(prefix): tensor for key, tensor in tensors.items()})
    except InvalidInput as error:
        raise InvalidInput("weights", f"{path}: {error}") from error


def _size(weights: Weights, name: str, axis: int) -> int:
    if name not in weights:
        raise InvalidInput(name, "is missing")
    if weights[name].dim() != 2:
        raise InvalidInput(name, f"must be a matrix, got shape {tuple(weights[name].shape)}")
    return weights[name].shape[axis]


def _check(weights: Weights, whose: str, required: Shapes, *groups: Shapes) -> None:
    """`groups`: names that come together or not at all."""
    shapes = dict(required)
    for group in groups:
        if any(name in weights for name in group):
            shapes |= group
    unknown = weights.keys() - shapes.keys()
    if unknown:
        raise InvalidInput(min(unknown), f"{whose}'s layer has no such weight, but {_listed(shapes)}")
    for name, shape in shapes.items():
        if name not in weights:
            raise InvalidInput(name, f"is missing; {whose}'s layer needs it beside {_listed(weights)}")
        got = tuple(weights[name].shape)
        if len(got) != len(shape) or any(want not in (None, size) for want, size in zip(shape, got, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise InvalidInput(name, f"must be ({wanted}) in {whose}'s layer, got {got}")


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:12]) + (" and more" if len(listed) > 12 else "") or "nothing"
