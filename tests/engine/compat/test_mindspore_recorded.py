"""What the real class gave, release 1.5.2 and 1.10.0, and what ours gives for the same parameters and inputs.

tests/data/mindspore: index.json describes each case (constructor, calls, inputs, outputs), one safetensors file holds
its tensors: `param.<name>`, `call<i>.<input or output>`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from engine.compat.mindspore import MultiHeadAttention
from engine.errors import LengthExceeded
from tests.engine.compat.mindspore_oracle import Oracle

DATA = Path(__file__).parents[2] / "data" / "mindspore"
CASES: dict[str, dict[str, Any]] = {
    case["file"].removesuffix(".safetensors"): case for case in json.loads((DATA / "index.json").read_text())["cases"]
}
OUTPUTS = ("attn_out", "key_present", "value_present")


class Recorded:
    def __init__(self, name: str) -> None:
        case = CASES[name]
        self.calls, self.tensors = case["calls"], load_file(DATA / case["file"])
        self.options = {
            key: getattr(torch, value) if isinstance(value, str) else value for key, value in case["ctor"].items()
        }
        self.release = "1.10" if case["release"] == "1.10.0" else "1.5"
        self.parameters = {
            key.removeprefix("param."): value for key, value in self.tensors.items() if key.startswith("param.")
        }

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.options.get("compute_dtype") == torch.float32 else 1e-2

    def layer(self) -> MultiHeadAttention:
        layer = MultiHeadAttention(**self.options, release=self.release)
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in self.parameters.items()
        }
        layer.load_state_dict(self.parameters)
        return layer

    def oracle(self) -> Oracle:
        return Oracle({name: wide(tensor) for name, tensor in self.parameters.items()}, self.options["num_heads"])

    def inputs(self, call: int) -> dict[str, Tensor]:
        return {name: self.tensors[f"call{call}.{name}"] for name in self.calls[call]["inputs"]}

    def outputs(self, call: int) -> dict[str, Tensor]:
        return {name: self.tensors[f"call{call}.{name}"] for name in OUTPUTS}

    def overfull(self, call: int) -> bool:
        """A step of a row that has no slot left."""
        if self.calls[call]["is_first_iteration"] is not False:
            return False
        slots: int = self.options["tgt_seq_length"]
        return bool((self.tensors[f"call{call}.batch_valid_length"] > slots).any())


def run(layer: MultiHeadAttention, recorded: Recorded, call: int, **changed: Tensor) -> dict[str, Tensor]:
    first = recorded.calls[call]["is_first_iteration"]
    if first is not None:
        layer.add_flags_recursive(is_first_iteration=first)
    with torch.no_grad():
        out, (key_present, value_present) = layer(**{**recorded.inputs(call), **changed})
    return dict(zip(OUTPUTS, (out, key_present, value_present), strict=True))


def wide(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().numpy()


def assert_close(got: Tensor, expected: Tensor | NDArray[np.float64], tolerance: float) -> None:
    """Within tolerance * max(1, |expected|)."""
    exact = wide(expected) if isinstance(expected, Tensor) else expected
    assert np.isfinite(exact).all()
    difference = np.abs(wide(got) - exact) / np.maximum(1.0, np.abs(exact))
    assert difference.max() <= tolerance


def assert_recorded(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name in OUTPUTS:
        assert got[name].shape == expected[name].shape, name
        assert got[name].dtype == expected[name].dtype, name
        assert_close(got[name], expected[name], tolerance)


def named(*parts: str) -> list[str]:
    found = [name for name in CASES if any(part in name for part in parts)]
    assert found
    return found


# Where the original is not to be copied: what we do instead is asserted below, case by case.
BIG_SCORES = [name for name in named("big_scores") if name.endswith("fp16")]
ZERO_CHANNEL = named("past_zero_key_channel")
FULL = named("past_runs_full", "past_valid_length_zero_and_beyond")
ROUNDED_BY_THE_BACKEND = "1.5.2/fully_masked_rows_softmax_fp16_fp16"
GUIDE = named("seed_example")
PLAIN = [name for name in CASES if name not in {*BIG_SCORES, *ZERO_CHANNEL, *FULL, ROUNDED_BY_THE_BACKEND, *GUIDE}]


def test_every_recorded_case_has_its_test() -> None:
    assert len(CASES) == 61
    assert len(PLAIN) + len(BIG_SCORES) + len(ZERO_CHANNEL) + len(FULL) + 1 + len(GUIDE) == 61


@pytest.mark.parametrize("name", PLAIN)
def test_a_recorded_case_is_reproduced(name: str) -> None:
    recorded = Recorded(name)
    layer = recorded.layer()
    for call in range(len(recorded.calls)):
        assert_recorded(run(layer, recorded, call), recorded.outputs(call), recorded.tolerance)


@pytest.mark.parametrize("name", FULL)
def test_a_full_cache_is_refused_and_nothing_is_changed(name: str) -> None:
    """The original drops the token of a full row. Ours refuses the call; its other rows give what they gave there."""
    recorded = Recorded(name)
    layer = recorded.layer()
    refused = 0
    for call in range(len(recorded.calls)):
        if not recorded.overfull(call):
            assert_recorded(run(layer, recorded, call), recorded.outputs(call), recorded.tolerance)
            continue
        inputs = recorded.inputs(call)
        pasts = {part: inputs[part].clone() for part in ("key_past", "value_past")}
        with pytest.raises(LengthExceeded, match=r"^batch_valid_length: the cache has 5 slots"):
            run(layer, recorded, call, **pasts)
        assert all(torch.equal(pasts[part], inputs[part]) for part in pasts)
        refused += 1
        room = inputs["batch_valid_length"] <= 5
        if room.any():
            got = run(layer, recorded, call, batch_valid_length=inputs["batch_valid_length"].clamp(max=5))
            expected = recorded.outputs(call)
            got, expected = ({part: outputs[part][room] for part in OUTPUTS} for outputs in (got, expected))
            assert_recorded(got, expected, recorded.tolerance)
    assert refused


@pytest.mark.parametrize("name", ZERO_CHANNEL)
def test_a_key_with_a_zero_channel_is_a_position_like_any_other(name: str) -> None:
    """The original counts it out and puts the next token on top of an occupied slot."""
    recorded = Recorded(name)
    layer, oracle = recorded.layer(), recorded.oracle()
    present = run(layer, recorded, 0)
    assert_recorded(present, recorded.outputs(0), recorded.tolerance)
    for call in range(1, len(recorded.calls)):
        pasts = {"key_past": present["key_present"].half(), "value_past": present["value_present"].half()}
        inputs = {**recorded.inputs(call), **pasts}
        present = run(layer, recorded, call, **pasts)
        query, key, value = (wide(inputs[part]) for part in ("query_tensor", "key_tensor", "value_tensor"))
        lengths = inputs["batch_valid_length"].tolist()
        exact = oracle.step(query, key, value, wide(inputs["key_past"]), wide(inputs["value_past"]), lengths)
        for part, expected in zip(OUTPUTS, exact, strict=True):
            assert_close(present[part], expected, recorded.tolerance)
        assert (present["key_present"] - recorded.outputs(call)["key_present"]).abs().max() > 1


@pytest.mark.parametrize("name", BIG_SCORES)
def test_scores_beyond_float16_are_no_nan(name: str) -> None:
    """q.k is far above 65504 here. The values are in the hundreds, so the error is taken of the largest."""
    recorded = Recorded(name)
    got, inputs = run(recorded.layer(), recorded, 0), recorded.inputs(0)
    query, key, value = (wide(inputs[part]) for part in ("query_tensor", "key_tensor", "value_tensor"))
    exact = recorded.oracle().first(query, key, value, wide(inputs["attention_mask"]))
    for part, expected in zip(OUTPUTS, exact, strict=True):
        assert got[part].dtype == recorded.outputs(0)[part].dtype
        assert np.abs(wide(got[part]) - expected).max() <= 1e-3 * np.abs(expected).max()


def test_a_float16_softmax_of_masked_rows_rounds_as_its_type_says() -> None:
    """At -10000 float16 has steps of 8. 1.5.2's backend had kept float32 there; 1.10's rounds, and so do we."""
    early, late = Recorded(ROUNDED_BY_THE_BACKEND), Recorded(ROUNDED_BY_THE_BACKEND.replace("1.5.2", "1.10.0"))
    assert all(torch.equal(tensor, late.inputs(0)[name]) for name, tensor in early.inputs(0).items())
    got, expected = run(early.layer(), early, 0), early.outputs(0)
    assert got["attn_out"].dtype == expected["attn_out"].dtype
    assert_close(got["attn_out"], late.outputs(0)["attn_out"], 1e-2)
    sees = early.inputs(0)["attention_mask"].any(-1)
    assert sees.any()
    assert not sees.all()
    assert_close(got["attn_out"][sees], expected["attn_out"][sees], 1e-2)
    assert_recorded({**got, "attn_out": expected["attn_out"]}, expected, 1e-2)


@pytest.mark.parametrize("name", GUIDE)
def test_the_guides_example_has_the_recorded_shapes_and_types(name: str) -> None:
    """Its inputs are not recorded, only slices of what it gave."""
    recorded = Recorded(name)
    layer = MultiHeadAttention(32, 10, 20, 512, 8, release=recorded.release)
    inputs = [torch.randn(32, 10, 512), torch.randn(32, 20, 512), torch.randn(32, 20, 512), torch.ones(32, 10, 20)]
    with torch.no_grad():
        out, presents = layer(*inputs)
    for part, got in zip(OUTPUTS, (out, *presents), strict=True):
        dtype, shape = recorded.calls[0]["outputs"][part]
        assert (got.dtype, list(got.shape)) == (getattr(torch, dtype), shape)
        [piece] = [tensor for key, tensor in recorded.tensors.items() if key.startswith(f"call0.{part}[")]
        assert (piece.dtype, piece.shape[1:]) == (got.dtype, got.shape[1:])
