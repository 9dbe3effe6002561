"""MindSpore's layer against an oracle in NumPy and float64, against torch's own, and as a module among modules."""

import copy
import pickle
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from engine import layers
from engine.compat.convert import from_mindspore
from engine.compat.mindspore import Cell, MultiHeadAttention, add_flags_recursive
from tests.engine.compat.mindspore_oracle import Oracle

FLOATS = st.sampled_from([torch.float16, torch.float32])
NAMES = ("query_tensor", "key_tensor", "value_tensor")


@dataclass(frozen=True)
class Shape:
    batch: int
    n: int
    m: int
    heads: int
    head_dim: int

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


SHAPES = st.builds(Shape, st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))


def build(shape: Shape, seed: int = 0, **options: Any) -> MultiHeadAttention:
    """A layer whose outputs are of the size of its inputs; the original's own 0.01 would hide much."""
    layer = MultiHeadAttention(shape.batch, shape.n, shape.m, shape.hidden, shape.heads, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            spread = 0.2 if name.endswith("bias") else shape.hidden**-0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return layer


def oracle(layer: MultiHeadAttention) -> Oracle:
    return Oracle({name: wide(parameter) for name, parameter in layer.named_parameters()}, layer.num_heads)


def wide(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy()


def assert_close(got: Tensor, expected: NDArray[np.float64], tolerance: float) -> None:
    assert np.all(np.abs(wide(got) - expected) <= tolerance * np.maximum(1.0, np.abs(expected)))


def inputs(shape: Shape, seed: int = 1, n: int | None = None, m: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (n or shape.n, m or shape.m, m or shape.m)
    return {
        name: torch.randn(shape.batch, length, shape.hidden, generator=generator)
        for name, length in zip(NAMES, lengths, strict=True)
    }


def causal(lengths: list[int], slots: int) -> Tensor:
    """What a prompt needs: (B, slots, slots), lower triangle, padding hidden."""
    seen = torch.arange(slots) < torch.tensor(lengths)[:, None]
    return torch.ones(slots, slots).tril() * seen[:, None]


def int32(lengths: list[int]) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


MASK_VALUES = {
    "binary": [0.0, 1.0],
    "odd": [0.0, 0.25, 0.5, 1.0, 2.0, -1.0],  # and rows that are fully masked
}


@settings(max_examples=120, deadline=None)
@given(
    shape=SHAPES,
    seed=st.integers(0, 999),
    compute=FLOATS,
    softmax=FLOATS,
    parameters=FLOATS,
    dtypes=st.lists(FLOATS, min_size=4, max_size=4),
    flat=st.lists(st.booleans(), min_size=3, max_size=3),
    values=st.sampled_from(["binary", "odd"]),
    release=st.sampled_from(["1.5", "1.10"]),
)
def test_any_call_without_a_past_gives_what_the_oracle_gives(
    shape: Shape,
    seed: int,
    compute: torch.dtype,
    softmax: torch.dtype,
    parameters: torch.dtype,
    dtypes: list[torch.dtype],
    flat: list[bool],
    values: str,
    release: str,
) -> None:
    odd = values == "odd" and softmax == torch.float32  # float16 has steps of 8 at -10000: no oracle has its rounding
    options = {"compute_dtype": compute, "softmax_compute_type": softmax, "param_init_type": parameters}
    layer = build(shape, seed, release=release, **options)
    tensors = {
        name: tensor.to(dtype) for (name, tensor), dtype in zip(inputs(shape, seed).items(), dtypes, strict=False)
    }
    generator = np.random.default_rng(seed)
    mask = generator.choice(MASK_VALUES["odd" if odd else "binary"], (shape.batch, shape.n, shape.m))
    if not odd:
        mask[:, :, generator.integers(shape.m)] = 1.0
    query, key, value = (wide(tensor) for tensor in tensors.values())
    expected = oracle(layer).first(query, key, value, mask)

    given_as = {
        name: tensor.flatten(0, 1) if two else tensor for (name, tensor), two in zip(tensors.items(), flat, strict=True)
    }
    out, (key_present, value_present) = layer(**given_as, attention_mask=torch.from_numpy(mask).to(dtypes[3]))
    assert out.shape == given_as["query_tensor"].shape
    assert out.dtype == (dtypes[0] if release == "1.10" else compute)
    assert key_present.dtype == value_present.dtype == compute
    exact = torch.float16 not in (compute, softmax, out.dtype)
    # An odd mask moves scores by thousands, where float32 has steps of 2**-9 and less.
    tolerance = 1e-2 if odd else 1e-4 if exact else 1e-2
    assert_close(out.view(shape.batch, shape.n, shape.hidden), expected[0], tolerance)
    for present, wanted in zip((key_present, value_present), expected[1:], strict=True):
        assert present.shape == wanted.shape
        assert_close(present, wanted, 1e-4 if compute == torch.float32 else 1e-2)


def test_a_float16_mask_is_widened_before_it_is_scaled() -> None:
    """float16 values next to each other near 1/3 are 2.4 apart in scores: less than float16 shows of 10000 * 2/3."""
    shape = Shape(batch=2, n=3, m=4, heads=2, head_dim=4)
    layer, tensors = build(shape, compute_dtype=torch.float32), inputs(shape)
    mask = (1365 + torch.randint(3, (2, 3, 4), generator=torch.Generator().manual_seed(5))).half() / 4096
    query, key, value = (wide(tensor) for tensor in tensors.values())
    expected, *_ = oracle(layer).first(query, key, value, wide(mask))
    assert_close(layer(**tensors, attention_mask=mask)[0], expected, 5e-3)


@st.composite
def pasts(draw: st.DrawFn) -> tuple[Shape, list[int]]:
    shape = draw(SHAPES)
    shape = replace(shape, n=shape.m)
    return shape, draw(st.lists(st.integers(0, shape.m + 2), min_size=shape.batch, max_size=shape.batch))


@settings(max_examples=80, deadline=None)
@given(drawn=pasts(), seed=st.integers(0, 999), compute=FLOATS, softmax=FLOATS, dtype=FLOATS, flat=st.booleans())
def test_a_prompt_and_its_steps_give_what_the_oracle_gives(
    drawn: tuple[Shape, list[int]],
    seed: int,
    compute: torch.dtype,
    softmax: torch.dtype,
    dtype: torch.dtype,
    flat: bool,
) -> None:
    """Ragged rows, lengths of 0 and beyond the cache in the prompt; then steps of every row until one is full."""
    shape, lengths = drawn
    slots = shape.m
    layer = build(shape, seed, compute_dtype=compute, softmax_compute_type=softmax, use_past=True)
    truth = oracle(layer)
    tolerance = 1e-4 if compute == softmax == torch.float32 else 1e-2

    prompt = {name: tensor.to(dtype) for name, tensor in inputs(shape, seed).items()}
    mask = causal([max(length, 1) for length in lengths], slots)
    garbage = torch.full((shape.batch, shape.heads, shape.head_dim, slots), torch.nan, dtype=torch.float16)
    call = {"key_past": garbage, "value_past": garbage.transpose(2, 3), "batch_valid_length": int32(lengths)}
    out, present = layer(**prompt, attention_mask=mask, **call)
    kept = [min(length, slots) for length in lengths]
    query, key, value = (wide(tensor) for tensor in prompt.values())
    expected = truth.first(query, key, value, wide(mask), kept)
    for got, wanted in zip((out, *present), expected, strict=True):
        assert_close(got, wanted, tolerance)
    for row, length in enumerate(kept):
        assert not present[0][row, :, :, length:].any()
        assert not present[1][row, :, length:].any()

    layer.add_flags_recursive(is_first_iteration=False)
    while max(kept) < slots:
        kept = [length + 1 for length in kept]
        step = {name: tensor.to(dtype) for name, tensor in inputs(shape, seed + kept[0], 1, 1).items()}
        past = [tensor.half() for tensor in present]
        before = [tensor.clone() for tensor in past]
        query, key, value = (wide(tensor) for tensor in step.values())
        expected = truth.step(query, key, value, wide(past[0]), wide(past[1]), kept)
        given_as = {name: tensor.flatten(0, 1) if flat else tensor for name, tensor in step.items()}
        out, present = layer(*given_as.values(), torch.zeros(shape.batch, 1, slots), *past, int32(kept))
        assert out.shape == given_as["query_tensor"].shape
        for got, wanted in zip((out.view(shape.batch, 1, shape.hidden), *present), expected, strict=True):
            assert_close(got, wanted, tolerance)
            assert got.dtype == compute
        assert all(torch.equal(now, then) for now, then in zip(past, before, strict=True))


@pytest.mark.parametrize(("compute", "tolerance"), [(torch.float16, 1e-2), (torch.float32, 5e-3)])
def test_a_long_prompt_equals_a_shorter_one_and_steps_for_every_split(compute: torch.dtype, tolerance: float) -> None:
    """Row by row, at lengths that differ; the pasts are float16 in either compute dtype."""
    shape = Shape(batch=3, n=9, m=9, heads=4, head_dim=4)
    layer = build(shape, use_past=True, compute_dtype=compute)
    tensors, ends = inputs(shape), [9, 6, 8]
    empty = torch.zeros(3, 4, 4, 9).half()

    def prompt(lengths: list[int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        layer.is_first_iteration = True
        result: tuple[Tensor, tuple[Tensor, Tensor]] = layer(
            **tensors,
            attention_mask=causal(lengths, 9),
            key_past=empty,
            value_past=empty.mT,
            batch_valid_length=int32(lengths),
        )
        return result

    whole, whole_present = prompt(ends)
    for steps in range(1, 6):
        lengths = [end - steps for end in ends]
        _, present = prompt(lengths)
        layer.is_first_iteration = False
        for _ in range(steps):
            rows = torch.arange(3), torch.tensor(lengths)
            step = {name: tensor[rows][:, None] for name, tensor in tensors.items()}
            lengths = [length + 1 for length in lengths]
            out, present = layer(
                *step.values(), torch.ones(3, 1, 9), *(part.half() for part in present), int32(lengths)
            )
            assert_close(out[:, 0], wide(whole[rows]), tolerance)
        for got, wanted in zip(present, whole_present, strict=True):
            assert_close(got, wide(wanted), tolerance)


def test_a_repeated_length_replaces_the_same_position() -> None:
    """The length is the truth: the original, which counts, would go on to the next slot."""
    shape = Shape(batch=1, n=5, m=5, heads=2, head_dim=3)
    layer = build(shape, use_past=True)
    empty = torch.zeros(1, 2, 3, 5).half()
    _, past = layer(*inputs(shape).values(), causal([3], 5), empty, empty.mT, int32([3]))
    layer.is_first_iteration = False
    first, second = inputs(shape, 7, 1, 1), inputs(shape, 8, 1, 1)
    _, after_one = layer(*first.values(), torch.ones(1, 1, 5), *past, int32([4]))
    again = layer(*second.values(), torch.ones(1, 1, 5), *after_one, int32([4]))
    alone = layer(*second.values(), torch.ones(1, 1, 5), *past, int32([4]))
    assert torch.equal(again[0], alone[0])
    assert all(torch.equal(one, other) for one, other in zip(again[1], alone[1], strict=True))


def test_the_guides_example() -> None:
    layer = MultiHeadAttention(batch_size=32, hidden_size=512, src_seq_length=10, tgt_seq_length=20, num_heads=8)
    query, key, value = torch.ones(32, 10, 512), torch.ones(32, 20, 512), torch.ones(32, 20, 512)
    out, (key_present, value_present) = layer(query, key, value, torch.ones(32, 10, 20))
    assert (out.shape, out.dtype) == ((32, 10, 512), torch.float16)
    assert key_present.shape == (32, 8, 64, 20)
    assert value_present.shape == (32, 8, 20, 64)


def with_weights_of(layer: MultiHeadAttention) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(layer.hidden_size, layer.num_heads, batch_first=True).eval()
    denses = (layer.dense1, layer.dense2, layer.dense3)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([dense.weight for dense in denses]),
            "in_proj_bias": torch.cat([dense.bias for dense in denses]),
            "out_proj.weight": layer.projection.weight.T,
            "out_proj.bias": layer.projection.bias,
        }
    )
    return theirs


def test_the_core_with_converted_weights_gives_the_same_over_the_same_past() -> None:
    shape = Shape(batch=2, n=5, m=5, heads=2, head_dim=4)
    layer = build(shape, use_past=True)
    core = layers.MultiHeadAttention(8, 2)
    core.load_state_dict(from_mindspore(layer.state_dict()))
    prompt, step, empty = inputs(shape), inputs(shape, 2, 1, 1), torch.zeros(2, 2, 4, 5).half()
    mask = causal([3, 2], 5)
    out, (key, value) = layer(*prompt.values(), mask, empty, empty.mT, int32([3, 2]))
    got, present, _ = core.stateless(*prompt.values(), attention_mask=mask, batch_valid_length=int32([3, 2]))
    assert_close(got, wide(out), 1e-3)
    assert torch.equal(present.key, key)
    assert torch.equal(present.value, value)
    layer.is_first_iteration = False
    out, _ = layer(*step.values(), torch.ones(2, 1, 5), key, value, int32([4, 3]))
    got, _, _ = core.stateless(*step.values(), past=present, batch_valid_length=int32([4, 3]))
    assert_close(got, wide(out), 1e-3)


@pytest.mark.parametrize(("compute", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_gradients_are_torchs(compute: torch.dtype, tolerance: float) -> None:
    shape = Shape(batch=2, n=4, m=5, heads=3, head_dim=4)
    layer = build(shape, compute_dtype=compute)
    theirs = with_weights_of(layer)
    mask = (torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(2)) < 0.6).float()
    mask[..., 0] = 1
    ours_in, theirs_in = inputs(shape), inputs(shape)
    for tensor in (*ours_in.values(), *theirs_in.values()):
        tensor.requires_grad_()
    out, _ = layer(**ours_in, attention_mask=mask)
    expected, _ = theirs(*theirs_in.values(), attn_mask=(mask == 0).repeat_interleave(3, 0), need_weights=False)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (out.float() * weights).sum().backward()
    (expected * weights).sum().backward()

    assert_close(out, wide(expected), tolerance)
    for name in NAMES:
        assert_close(gradient(ours_in[name]), wide(gradient(theirs_in[name])), tolerance)
    denses = [layer.get_submodule(f"dense{at}") for at in (1, 2, 3)]
    for part in ("weight", "bias"):
        merged = torch.cat([gradient(dense.get_parameter(part)) for dense in denses])
        assert_close(merged, wide(gradient(theirs.get_parameter(f"in_proj_{part}"))), tolerance)
    assert_close(gradient(layer.projection.weight).T, wide(gradient(theirs.out_proj.weight)), tolerance)
    assert_close(gradient(layer.projection.bias), wide(gradient(theirs.out_proj.bias)), tolerance)


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_parameters_are_the_originals_by_name_order_shape_and_initialiser() -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(2, 3, 3, 96, 4)
    names = [
        f"{module}.{part}" for module in ("projection", "dense1", "dense2", "dense3") for part in ("weight", "bias")
    ]
    assert [name for name, _ in layer.named_parameters()] == names
    assert [name for name, _ in layer.parameters_and_names()] == names
    assert list(layer.state_dict()) == names
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == torch.float32
        if name.endswith("bias"):
            assert parameter.shape == (96,)
            assert not parameter.any()
        else:
            assert parameter.shape == (96, 96)
            assert abs(parameter.mean().item()) < 1e-3
            assert abs(parameter.std().item() - 0.01) < 1e-3


def test_dropout_acts_after_set_train_only() -> None:
    """Of one key the probability is 1, so that dropout of it leaves nothing or 1 / keep of the value."""
    shape = Shape(batch=64, n=1, m=1, heads=1, head_dim=8)
    layer = build(shape, hidden_dropout_rate=0.0, attention_dropout_rate=0.5, compute_dtype=torch.float32)
    tensors, mask = inputs(shape), torch.ones(64, 1, 1)
    plain, _ = layer(*tensors.values(), mask)
    bias = layer.projection.bias
    assert torch.equal(layer(*tensors.values(), mask)[0], plain)
    assert not layer.training

    torch.manual_seed(0)
    assert layer.set_train() is layer
    dropped, (key_present, _) = layer(*tensors.values(), mask)
    nothing = torch.isclose(dropped, bias, atol=1e-5).all(-1)
    twice = torch.isclose(dropped - bias, 2 * (plain - bias), atol=1e-4).all(-1)
    assert torch.equal(nothing, ~twice)
    assert 10 < nothing.sum() < 54
    layer.set_train(False)
    out, (key_plain, _) = layer(*tensors.values(), mask)
    assert torch.equal(out, plain)
    assert torch.equal(key_present, key_plain)


def test_dropout_of_the_output_zeroes_some_and_scales_the_rest() -> None:
    shape = Shape(batch=4, n=5, m=5, heads=2, head_dim=16)
    layer = build(shape, hidden_dropout_rate=0.25, attention_dropout_rate=0.0, compute_dtype=torch.float32)
    tensors, mask = inputs(shape), torch.ones(4, 5, 5)
    plain, _ = layer(*tensors.values(), mask)
    torch.manual_seed(0)
    dropped, _ = layer.train()(*tensors.values(), mask)
    gone = dropped == 0
    assert 0.15 < gone.float().mean() < 0.35
    torch.testing.assert_close(dropped[~gone], plain[~gone] / 0.75)


class Block(nn.Module):
    """A module of a caller's own around the layer; a `Cell` would have the methods."""

    def __init__(self, layer: MultiHeadAttention) -> None:
        super().__init__()
        self.inner = nn.ModuleList([layer])


class CellBlock(Cell):
    def __init__(self, layer: MultiHeadAttention) -> None:
        super().__init__()
        self.inner = nn.ModuleList([layer])


def test_flags_reach_the_whole_tree_below_any_module() -> None:
    layer = MultiHeadAttention(2, 3, 3, 12, 3, use_past=True)
    assert layer.is_first_iteration is True
    add_flags_recursive(Block(layer), is_first_iteration=False)
    assert layer.is_first_iteration is False
    cell = CellBlock(layer)
    assert cell.add_flags_recursive(is_first_iteration=True) is cell
    assert layer.is_first_iteration is True
    assert cell.training is False
    cell.set_train()
    assert layer.training is True
    cell.add_flags_recursive(training=False)  # MindSpore's own way to set_train
    layer.use_past = False
    call = (*(torch.randn(2, 3, 12) for _ in range(3)), torch.ones(2, 3, 3))
    assert torch.equal(layer(*call)[0], layer(*call)[0])


def test_copies_and_pickles_are_layers_of_their_own() -> None:
    shape = Shape(batch=2, n=3, m=4, heads=2, head_dim=4)
    layer = build(shape, release="1.10")
    tensors, mask = inputs(shape), torch.ones(2, 3, 4)
    expected, _ = layer(*tensors.values(), mask)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert list(other.state_dict()) == list(layer.state_dict())
        assert torch.equal(other(*tensors.values(), mask)[0], expected)
        with torch.no_grad():
            other.dense3.weight.zero_()
            other.projection.weight.zero_()
        torch.testing.assert_close(
            other(*tensors.values(), mask)[0], other.projection.bias.expand(2, 3, 8), atol=1e-3, rtol=0
        )
        assert torch.equal(layer(*tensors.values(), mask)[0], expected)


def test_a_linear_that_is_replaced_is_the_one_that_runs() -> None:
    shape = Shape(batch=2, n=3, m=4, heads=2, head_dim=4)
    layer = build(shape)
    layer.dense3 = layers.Linear(8, 8)
    nn.init.zeros_(layer.dense3.weight)
    nn.init.ones_(layer.dense3.bias)
    _, (_, value_present) = layer(*inputs(shape).values(), torch.ones(2, 3, 4))
    assert torch.equal(value_present, torch.ones(2, 2, 4, 4).half())


def test_half_and_to_reach_every_parameter() -> None:
    shape = Shape(batch=2, n=3, m=4, heads=2, head_dim=4)
    layer = build(shape)
    tensors, mask = inputs(shape), torch.ones(2, 3, 4)
    expected, _ = layer(*tensors.values(), mask)
    assert all(parameter.dtype == torch.float16 for parameter in layer.half().parameters())
    assert_close(layer(*tensors.values(), mask)[0], wide(expected), 1e-2)
    meta = layer.to("meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    out, (key_present, _) = meta(*(tensor.to("meta") for tensor in tensors.values()), mask.to("meta"))
    assert out.shape == expected.shape
    assert key_present.is_meta


def test_a_projection_packs_as_it_multiplies() -> None:
    """What serving does to any linear; this one's weight lies the other way round."""
    shape = Shape(batch=1, n=2, m=2, heads=2, head_dim=8)
    projection = build(shape).projection
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    expected = x @ projection.weight.detach() + projection.bias.detach()
    projection.pack()
    torch.testing.assert_close(projection(x), expected)


def test_a_step_compiles_as_one_graph_for_every_length() -> None:
    shape = Shape(batch=2, n=6, m=6, heads=2, head_dim=4)
    layer = build(shape, use_past=True)
    layer.is_first_iteration = False
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=False)
    past = [torch.zeros(2, 2, 4, 6).half(), torch.zeros(2, 2, 6, 4).half()]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for length in range(1, 7):
            call = (
                *inputs(shape, length, 1, 1).values(),
                torch.ones(2, 1, 6),
                *past,
                int32([length, max(length - 1, 1)]),
            )
            out, present = compiled(*call)
            expected, expected_present = layer(*call)
            assert torch.equal(out, expected)
            assert all(torch.equal(one, other) for one, other in zip(present, expected_present, strict=True))
            past = list(present)
