"""Weights in three namings: what they compute, the way back, and what is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from engine.compat import convert
from engine.errors import InvalidInput
from engine.layers import MultiHeadAttention

SIZE, HEADS = 12, 3
Weights = dict[str, Tensor]


def torch_layer(**options: Any) -> torch.nn.MultiheadAttention:
    torch.manual_seed(5)
    layer = torch.nn.MultiheadAttention(SIZE, HEADS, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.4)
    return layer.eval()


def mindspore_weights() -> Weights:
    generator = torch.Generator().manual_seed(7)
    shapes = {"weight": (SIZE, SIZE), "bias": (SIZE,)}
    return {
        f"{name}.{part}": torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4
        for name in ("dense1", "dense2", "dense3", "projection")
        for part, shape in shapes.items()
    }


def copies(weights: Weights) -> Weights:
    """What safetensors wants: no two tensors on one storage."""
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


@settings(max_examples=40, deadline=None)
@given(
    bias=st.booleans(), bias_kv=st.booleans(), kdim=st.sampled_from([None, SIZE, 7]), vdim=st.sampled_from([None, 5])
)
def test_torchs_weights_become_ours_and_torchs_again(
    bias: bool, bias_kv: bool, kdim: int | None, vdim: int | None
) -> None:
    theirs = torch_layer(bias=bias, add_bias_kv=bias_kv, kdim=kdim, vdim=vdim)
    ours = MultiHeadAttention(
        SIZE, HEADS, kdim=kdim, vdim=vdim, qkv_bias=bias, output_bias=bias, bias_kv=bias_kv,
        compute_dtype=torch.float64, softmax_dtype=torch.float64,
    ).double()  # fmt: skip
    ours.load_state_dict(convert.from_torch(theirs.state_dict()))
    query, key, value = torch.randn(2, 4, SIZE), torch.randn(2, 6, kdim or SIZE), torch.randn(2, 6, vdim or SIZE)
    query, key, value = query.double(), key.double(), value.double()
    torch.testing.assert_close(ours.stateless(query, key, value)[0], theirs(query, key, value)[0])
    back = convert.to_torch(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_mindspores_projection_is_stored_the_other_way_round() -> None:
    """dense: x @ W.T + b; projection: x @ W + b."""
    weights = mindspore_weights()
    ours = MultiHeadAttention(SIZE, HEADS, compute_dtype=torch.float64, softmax_dtype=torch.float64).double()
    ours.load_state_dict(convert.from_mindspore(weights))
    x = torch.randn(2, 5, SIZE, dtype=torch.float64)
    q, k, v = (
        (x @ weights[f"dense{i}.weight"].T + weights[f"dense{i}.bias"]).view(2, 5, HEADS, -1).transpose(1, 2)
        for i in (1, 2, 3)
    )
    attended = torch.softmax(q @ k.mT / (SIZE // HEADS) ** 0.5, -1) @ v
    expected = attended.transpose(1, 2).flatten(2) @ weights["projection.weight"] + weights["projection.bias"]
    torch.testing.assert_close(ours.stateless(x, x, x)[0], expected)
    back = convert.to_mindspore(ours.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_gradients_flow_through_a_conversion() -> None:
    weights = {name: tensor.requires_grad_() for name, tensor in torch_layer(add_bias_kv=True).state_dict().items()}
    total = sum(tensor.sum() for tensor in convert.to_torch(convert.from_torch(weights)).values())
    assert isinstance(total, Tensor)
    for name, gradient in zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True):
        assert torch.equal(gradient, torch.ones_like(weights[name])), name


@pytest.mark.parametrize("prefix", ["", "encoder.layers.0.self_attn."])
@pytest.mark.parametrize("naming", ["ours", "torch", "mindspore"])
def test_a_file_is_read_in_any_naming(tmp_path: Path, naming: str, prefix: str) -> None:
    ours = convert.from_mindspore(mindspore_weights())
    named = {"ours": ours, "torch": convert.to_torch(ours), "mindspore": convert.to_mindspore(ours)}[naming]
    save_file({prefix + name: tensor.clone().contiguous() for name, tensor in named.items()}, tmp_path / "layer")
    got = convert.read(tmp_path / "layer")
    assert got.keys() == ours.keys()
    assert all(torch.equal(got[name], ours[name]) for name in ours)


def ours() -> Weights:
    return copies(convert.from_torch(torch_layer(add_bias_kv=True).state_dict()))


def theirs() -> Weights:
    return copies(torch_layer(add_bias_kv=True).state_dict())


def separate() -> Weights:
    return copies(torch_layer(kdim=7).state_dict())


Change = tuple[str, tuple[int, ...] | None]  # a weight put there with this shape, or taken away
REFUSED: list[tuple[Callable[[], Weights], Change, str]] = [
    (ours, ("q_proj.weight", None), "q_proj.weight: is missing"),
    (ours, ("k_proj.bias", None), "k_proj.bias: is missing"),
    (ours, ("bias_v", None), "bias_v: is missing"),
    (ours, ("q_proj.weight", (SIZE, 5)), r"q_proj.weight: must be \(12, 12\)"),
    (ours, ("v_proj.weight", (5, SIZE)), r"v_proj.weight: must be \(12, any\)"),
    (ours, ("bias_k", (1, 1, SIZE)), r"bias_k: must be \(12\)"),
    (ours, ("o_proj.weight", (SIZE,)), "o_proj.weight: must be a matrix"),
    (ours, ("gate.weight", (SIZE, SIZE)), "gate.weight: keypast's layer has no such weight"),
    (theirs, ("in_proj_weight", (SIZE, SIZE)), r"in_proj_weight: must be \(36, 12\)"),
    (theirs, ("in_proj_weight", None), "q_proj_weight: is missing"),
    (theirs, ("in_proj_bias", None), "in_proj_bias: is missing"),
    (theirs, ("out_proj.bias", (5,)), r"out_proj.bias: must be \(12\)"),
    (theirs, ("bias_k", (SIZE,)), r"bias_k: must be \(1, 1, 12\)"),
    (theirs, ("q_proj_weight", (SIZE, SIZE)), "q_proj_weight: torch's layer has no such weight"),
    (separate, ("k_proj_weight", None), "k_proj_weight: is missing"),
    (separate, ("v_proj_weight", (5, 5)), r"v_proj_weight: must be \(12, any\)"),
    (mindspore_weights, ("dense2.weight", (SIZE, 5)), r"dense2.weight: must be \(12, 12\)"),
    (mindspore_weights, ("dense3.bias", None), "dense3.bias: is missing"),
    (mindspore_weights, ("projection.weight", None), "must hold one layer, .* it has dense1.bias, dense1.weight"),
    (mindspore_weights, ("bias_k", (SIZE,)), "bias_k: MindSpore's layer has no such weight"),
    (mindspore_weights, ("out_proj.weight", (SIZE, SIZE)), "must hold one layer"),
]


@pytest.mark.parametrize(("weights", "change", "message"), REFUSED)
def test_a_file_is_refused_by_the_name_that_is_wrong(
    tmp_path: Path, weights: Callable[[], Weights], change: Change, message: str
) -> None:
    tensors = weights()
    name, shape = change
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "layer.safetensors")
    with pytest.raises(InvalidInput, match=message) as caught:
        convert.read(tmp_path / "layer.safetensors")
    assert caught.value.field == "weights"
    assert "layer.safetensors" in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(b"{}")
    for path in (tmp_path / "layer", tmp_path / "nowhere"):
        with pytest.raises(InvalidInput, match=f"cannot read {path}"):
            convert.read(path)


def test_what_mindspores_layer_cannot_hold_is_refused_by_name() -> None:
    for options, name in (
        ({"bias": False}, "q_proj.bias"),
        ({"add_bias_kv": True}, "bias_k"),
        ({"kdim": 7}, "k_proj.weight"),
        ({"vdim": 7}, "v_proj.weight"),
    ):
        weights = convert.from_torch(torch_layer(**options).state_dict())
        with pytest.raises(InvalidInput, match="MindSpore's layer") as caught:
            convert.to_mindspore(weights)
        assert caught.value.field == name


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kv_heads": 1}, "k_proj.weight"),
        ({"head_dim": 8}, "q_proj.weight"),
        ({"output_bias": False}, "o_proj.bias"),
    ],
)
def test_what_torchs_layer_cannot_hold_is_refused_by_name(options: dict[str, int], name: str) -> None:
    layer = MultiHeadAttention(SIZE, HEADS, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="torch's layer") as caught:
        convert.to_torch(layer.state_dict())
    assert caught.value.field == name
