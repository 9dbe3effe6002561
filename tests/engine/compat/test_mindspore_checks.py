"""Each TypeError and ValueError of MindSpore's layer, and each argument that is just right."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.compat.mindspore import MultiHeadAttention, OpParallelConfig

SIZES: dict[str, Any] = {"batch_size": 2, "src_seq_length": 3, "tgt_seq_length": 4, "hidden_size": 12, "num_heads": 3}
B, S, T, H, N = SIZES.values()
D = H // N


class Derived(OpParallelConfig):
    pass


INTS = [(name, value) for name in SIZES for value in (True, 2.0, None, "2", np.int64(2), [2])]
RATES = [
    (name, value) for name in ("hidden_dropout_rate", "attention_dropout_rate") for value in (0, False, None, "0.1")
]
DTYPES = [
    (name, value)
    for name in ("compute_dtype", "softmax_compute_type", "param_init_type")
    for value in ("float16", np.float16, torch.bfloat16, torch.float64, torch.int32, None)
]
USE_PAST = [("use_past", value) for value in (1, 0, None, "True", np.bool_(True))]
CONFIG = [("parallel_config", value) for value in (None, {"data_parallel": 1}, Derived(1, 1), (1, 1), OpParallelConfig)]


@pytest.mark.parametrize(("name", "value"), [*INTS, *RATES, *DTYPES, *USE_PAST, *CONFIG])
def test_an_argument_of_another_type_is_a_type_error(name: str, value: object) -> None:
    arguments: dict[str, Any] = {**SIZES, name: value}
    with pytest.raises(TypeError, match=f"^{name}: must be"):
        MultiHeadAttention(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *[({name: value}, f"^{name}: must be at least 1") for name in SIZES for value in (0, -1)],
        ({"hidden_size": 13}, "^hidden_size: must be a multiple of num_heads, 3"),
        ({"parallel_config": OpParallelConfig(1, 2)}, "^num_heads: must be a multiple of model_parallel, 2"),
        *[
            ({name: value}, f"^{name}: must be at least 0 and below 1")
            for name in ("hidden_dropout_rate", "attention_dropout_rate")
            for value in (-0.1, 1.0, 1.5, float("nan"), float("inf"))
        ],
        ({"release": "2.0"}, "^release: must be one of 1.5, 1.10"),
    ],
)
def test_a_value_out_of_range_is_a_value_error(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**{**SIZES, **changed})


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_size_is_a_type_error(name: str) -> None:
    sizes: dict[str, Any] = {key: value for key, value in SIZES.items() if key != name}
    with pytest.raises(TypeError, match=name):
        MultiHeadAttention(**sizes)


def test_arguments_may_be_positional_in_the_originals_order() -> None:
    layer = MultiHeadAttention(
        2, 4, 4, 12, 3, 0.0, 0.2, torch.float32, torch.float16, torch.float16, True, OpParallelConfig(1, 3)
    )
    assert (layer.batch_size, layer.src_seq_length, layer.tgt_seq_length) == (2, 4, 4)
    assert (layer.hidden_size, layer.num_heads, layer.use_past) == (12, 3, True)
    assert all(parameter.dtype == torch.float16 for parameter in layer.parameters())


@pytest.mark.parametrize("name", ["data_parallel", "model_parallel"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(2.0, TypeError), (True, TypeError), (None, TypeError), ("2", TypeError), (0, ValueError), (-1, ValueError)],
)
def test_a_parallel_config_holds_positive_ints(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: must be"):
        OpParallelConfig(**{name: value})
    config = OpParallelConfig(3, 2)
    with pytest.raises(error, match=f"^{name}: must be"):
        setattr(config, name, value)
    assert repr(config) == "OpParallelConfig(data_parallel=3, model_parallel=2)"
    setattr(config, name, 4)
    assert getattr(config, name) == 4


def test_alone_a_config_changes_nothing() -> None:
    layer = MultiHeadAttention(**SIZES, parallel_config=OpParallelConfig(3, 3))
    assert layer.dense1.weight.shape == (H, H)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OpParallelConfig(3, 1), "^batch_size: must be a multiple of data_parallel, 3, got 2"),
        (OpParallelConfig(2, 1), r"^parallel_config: .* needs 2 ranks, there are 1"),
        (OpParallelConfig(1, 3), r"^parallel_config: .* needs 3 ranks, there are 1"),
    ],
)
def test_where_ranks_are_there_the_cuts_must_fit(config: OpParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**SIZES, parallel_config=config)


# The calls: without a past, the prompt of a past, a step of a past. S = T with a past.

SLOTS = {"key_past": (B, N, D, T), "value_past": (B, N, T, D)}


def call(phase: str) -> tuple[MultiHeadAttention, dict[str, Tensor | None]]:
    """A layer in its phase, and a call that is right."""
    if phase == "no past":
        plain: dict[str, Tensor | None] = {
            "query_tensor": torch.randn(B, S, H),
            "key_tensor": torch.randn(B, T, H),
            "value_tensor": torch.randn(B, T, H),
            "attention_mask": torch.ones(B, S, T),
        }
        return MultiHeadAttention(**SIZES), plain
    layer = MultiHeadAttention(**{**SIZES, "src_seq_length": T}, use_past=True)
    layer.is_first_iteration = phase == "first"
    n = T if phase == "first" else 1
    inputs: dict[str, Tensor | None] = {
        name: torch.randn(B, n, H) for name in ("query_tensor", "key_tensor", "value_tensor")
    }
    inputs["attention_mask"] = torch.ones(B, n, T)
    inputs |= {name: torch.zeros(shape, dtype=torch.float16) for name, shape in SLOTS.items()}
    inputs["batch_valid_length"] = torch.tensor([2, 3], dtype=torch.int32)
    return layer, inputs


PHASES = ("no past", "first", "step")
TENSORS = ("query_tensor", "key_tensor", "value_tensor")
PAST = ("key_past", "value_past", "batch_valid_length")


@pytest.mark.parametrize("phase", PHASES)
def test_a_call_that_is_right_passes(phase: str) -> None:
    layer, inputs = call(phase)
    out, presents = layer(**inputs)
    assert isinstance(inputs["query_tensor"], Tensor)
    assert out.shape == inputs["query_tensor"].shape
    assert [tuple(present.shape) for present in presents] == list(SLOTS.values())


def wrong_shapes() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for phase in PHASES:
        for name in TENSORS:
            length = 1 if phase == "step" else S if (phase, name) == ("no past", "query_tensor") else T
            yield from (
                (phase, name, shape)
                for shape in (
                    (H,),
                    (1, B, length, H),
                    (B, length + 1, H),
                    (B + 1, length, H),
                    (B, length, H + 1),
                    (B * length + 1, H),
                    (B * length, H - 1),
                    (length, B, H + 1),
                )
            )
        n = {"no past": S, "first": T, "step": 1}[phase]
        for shape in ((B, n, T + 1), (B, n + 1, T), (1, n, T), (n, T), (B, 1, n, T), (B, N, n, T)):
            yield phase, "attention_mask", shape
        if phase != "no past":
            yield from ((phase, "key_past", shape) for shape in ((B, N, T + 1, D), (B, N, D, T + 1), (B, N * D, T)))
            yield from ((phase, "value_past", shape) for shape in ((B, N, T, D + 1), (B, N, T + 1, D), (1, N, T, D)))
            yield from ((phase, "batch_valid_length", shape) for shape in ((B + 1,), (B, 1), (), (1,)))
    yield "step", "attention_mask", (B, T)
    yield "first", "attention_mask", (B, H)
    yield "no past", "attention_mask", (B, H)


@pytest.mark.parametrize(("phase", "name", "shape"), list(wrong_shapes()))
def test_a_wrong_shape_is_a_value_error(phase: str, name: str, shape: tuple[int, ...]) -> None:
    layer, inputs = call(phase)
    right = inputs[name]
    assert isinstance(right, Tensor)
    with pytest.raises(ValueError, match=f"^{name}: must have shape"):
        layer(**{**inputs, name: torch.ones(shape, dtype=right.dtype)})


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", [*TENSORS, "attention_mask"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.bfloat16, torch.float64])
def test_an_input_of_another_dtype_is_a_type_error(phase: str, name: str, dtype: torch.dtype) -> None:
    layer, inputs = call(phase)
    right = inputs[name]
    assert isinstance(right, Tensor)
    with pytest.raises(TypeError, match=f"^{name}: must be torch.float32 or torch.float16"):
        layer(**{**inputs, name: right.to(dtype)})


@pytest.mark.parametrize("phase", ["first", "step"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("key_past", torch.float32),
        ("value_past", torch.float32),
        ("key_past", torch.bfloat16),
        ("batch_valid_length", torch.int64),
        ("batch_valid_length", torch.float32),
    ],
)
def test_a_past_of_another_dtype_is_a_type_error(phase: str, name: str, dtype: torch.dtype) -> None:
    layer, inputs = call(phase)
    right = inputs[name]
    assert isinstance(right, Tensor)
    with pytest.raises(TypeError, match=f"^{name}: must be torch"):
        layer(**{**inputs, name: right.to(dtype)})


@pytest.mark.parametrize("phase", ["first", "step"])
@pytest.mark.parametrize("name", PAST)
@pytest.mark.parametrize("value", [None, 3, "missing"])
def test_a_past_that_is_missing_is_a_type_error(phase: str, name: str, value: object) -> None:
    layer, inputs = call(phase)
    arguments: dict[str, Any] = {**inputs, name: value}
    if value == "missing":
        del arguments[name]
    with pytest.raises(TypeError, match=f"^{name}: use_past needs a tensor"):
        layer(**arguments)


@pytest.mark.parametrize("name", PAST)
def test_a_past_that_nobody_asked_for_is_a_type_error(name: str) -> None:
    layer, inputs = call("no past")
    with pytest.raises(TypeError, match=f"^{name}: must be None"):
        layer(**inputs, **{name: call("first")[1][name]})


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", [*TENSORS, "attention_mask"])
def test_an_input_that_is_no_tensor_is_a_type_error(phase: str, name: str) -> None:
    layer, inputs = call(phase)
    right = inputs[name]
    assert isinstance(right, Tensor)
    for value in (None, right.tolist(), right.numpy()):
        with pytest.raises(TypeError, match=f"^{name}: must be a tensor"):
            layer(**{**inputs, name: value})
    with pytest.raises(TypeError, match=name):
        layer(**{key: tensor for key, tensor in inputs.items() if key != name})


def test_a_past_needs_queries_as_long_as_its_keys() -> None:
    layer = MultiHeadAttention(**SIZES, use_past=True)
    _, plain = call("no past")
    _, past = call("first")
    with pytest.raises(ValueError, match=r"^use_past: src_seq_length and tgt_seq_length must be equal, got 3 and 4"):
        layer(**plain, **{name: past[name] for name in PAST})


@pytest.mark.parametrize("lengths", [[0, 2], [2, -1]])
def test_a_step_counts_its_own_token(lengths: list[int]) -> None:
    layer, inputs = call("step")
    with pytest.raises(ValueError, match=r"^batch_valid_length: counts the new token"):
        layer(**{**inputs, "batch_valid_length": torch.tensor(lengths, dtype=torch.int32)})


@pytest.mark.parametrize("shape", [(B, 1, T), (B, H)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_steps_mask_is_checked_and_not_used(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, inputs = call("step")
    expected, _ = layer(**inputs)
    out, _ = layer(**{**inputs, "attention_mask": torch.zeros(shape, dtype=dtype)})
    assert torch.equal(out, expected)
