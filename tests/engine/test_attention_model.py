"""The attention kind against torch's own MultiheadAttention, and its masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from engine.attention.base import Rotary
from engine.batch import Truncate, Want
from engine.errors import InvalidInput
from engine.layers import MultiHeadAttention
from engine.models import build
from engine.models.attention import AttentionModel, attention_spec
from engine.models.base import LoadOptions
from engine.runner import ModelRunner
from tests.engine.models import CACHE, Served, backend

HIDDEN, HEADS = 24, 3


@pytest.fixture(scope="module")
def oracle() -> torch.nn.MultiheadAttention:
    torch.manual_seed(3)
    layer = torch.nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    return layer


@pytest.fixture(scope="module")
def weights(oracle: torch.nn.MultiheadAttention, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / "layer.safetensors"
    tensors: dict[str, Tensor] = {"o_proj.weight": oracle.out_proj.weight, "o_proj.bias": oracle.out_proj.bias}
    assert oracle.in_proj_weight is not None
    for name, weight, bias in zip("qkv", oracle.in_proj_weight.chunk(3), oracle.in_proj_bias.chunk(3), strict=True):
        tensors |= {f"{name}_proj.weight": weight, f"{name}_proj.bias": bias}
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, path)
    return path


def serve(weights: Path, backend_name: str, **options: Any) -> Served:
    spec = f"attention:hidden={HIDDEN},heads={HEADS},weights={weights}"
    given = {"dtype": "float32", "kv_dtype": "float32", "kernels": backend_name == "cpu", **options}
    loaded = build("layer", spec, LoadOptions(CACHE, **given), print)
    return Served(ModelRunner(loaded.model, backend(backend_name), 200, 16))


@pytest.fixture(scope="module", params=["cpu", "sdpa"])
def layer(request: pytest.FixtureRequest, weights: Path) -> Served:
    return serve(weights, request.param)


def tensors(batch: int, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=(batch, n, HIDDEN)).astype(np.float32) for name in ("query", "key", "value")}


def causal(batch: int, n: int, past: int = 0) -> np.ndarray:
    return np.repeat(np.tri(n, past + n, past, dtype=np.float32)[None], batch, 0)


def expected(
    oracle: torch.nn.MultiheadAttention, inputs: dict[str, np.ndarray], mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(attn_out, weights averaged over heads) of torch's layer; its masks say what may *not* be attended."""
    query, key, value = (torch.from_numpy(inputs[name]) for name in ("query", "key", "value"))
    hidden = torch.from_numpy(mask == 0).repeat_interleave(HEADS, 0)
    with torch.no_grad():
        out, probabilities = oracle(query, key, value, attn_mask=hidden)
    return out.numpy(), probabilities.numpy()


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_mask_gives_what_torch_gives(
    layer: Served, oracle: torch.nn.MultiheadAttention, batch: int, n: int, seed: int
) -> None:
    inputs = tensors(batch, n, seed)
    mask = (np.random.default_rng(seed).random((batch, n, n)) < 0.6).astype(np.float32)
    mask[:, np.arange(n), np.arange(n)] = 1  # torch gives NaN for a row with no key at all
    out, probabilities = expected(oracle, inputs, mask)
    session = layer.open(batch)
    result = layer.append(session, {**inputs, "attention_mask": mask}, Want(need_weights=True)).outputs
    np.testing.assert_allclose(result["attn_out"], out, atol=1e-4)
    np.testing.assert_allclose(result["attn_weights"], probabilities, atol=1e-5)
    layer.engine.delete_session(session)


def test_prefill_equals_shorter_prefill_and_steps_for_every_split(
    layer: Served, oracle: torch.nn.MultiheadAttention
) -> None:
    inputs = tensors(2, 35)
    out, _ = expected(oracle, inputs, causal(2, 35))
    for split in range(1, 35):
        session = layer.open(2)
        first = {name: array[:, :split] for name, array in inputs.items()}
        got = [layer.append(session, {**first, "attention_mask": causal(2, split)}).outputs["attn_out"]]
        for at in range(split, 35):
            step = {name: array[:, at : at + 1] for name, array in inputs.items()}
            got.append(layer.append(session, step, step=True).outputs["attn_out"])
        np.testing.assert_allclose(np.concatenate(got, axis=1), out, atol=1e-4)
        layer.engine.delete_session(session)


def test_a_chunk_at_a_past_sees_what_its_mask_says(layer: Served, oracle: torch.nn.MultiheadAttention) -> None:
    inputs = tensors(1, 30)
    mask = causal(1, 30)
    mask[0, 20:, 3] = 0  # the second chunk may not look at position 3
    out, _ = expected(oracle, inputs, mask)
    session = layer.open()
    for start, stop in ((0, 20), (20, 30)):
        part = {name: array[:, start:stop] for name, array in inputs.items()}
        result = layer.append(session, {**part, "attention_mask": mask[:, start:stop, :stop]})
        np.testing.assert_allclose(result.outputs["attn_out"], out[:, start:stop], atol=1e-4)


def test_padding_never_enters_the_past(layer: Served, oracle: torch.nn.MultiheadAttention) -> None:
    """Rows of 5 and 2 positions padded to 8; then both are stepped. Queries of the padding are answered too."""
    inputs, lengths = tensors(2, 8), [5, 2]
    session = layer.open(2)
    result = layer.append(session, {**inputs, "attention_mask": causal(2, 8)}, batch_valid_length=lengths).outputs[
        "attn_out"
    ]
    step = tensors(2, 1, seed=7)
    stepped = layer.append(session, step, step=True, batch_valid_length=[6, 3]).outputs["attn_out"]
    for row, length in enumerate(lengths):
        whole = {
            name: np.concatenate([inputs[name][row : row + 1, :length], step[name][row : row + 1]], axis=1)
            for name in inputs
        }
        out, _ = expected(oracle, whole, causal(1, length + 1))
        np.testing.assert_allclose(result[row, :length], out[0, :length], atol=1e-4)
        np.testing.assert_allclose(stepped[row], out[0, length:], atol=1e-4)
        first = {name: inputs[name][row : row + 1, :length] for name in ("key", "value")}
        padded = {**first, "query": inputs["query"][row : row + 1, length:]}
        out, _ = expected(oracle, padded, np.ones((1, 8 - length, length)))
        np.testing.assert_allclose(result[row, length:], out[0], atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=3), steps=st.integers(1, 8), data=st.data())
def test_prefill_equals_shorter_prefill_and_steps_for_ragged_rows(
    layer: Served, oracle: torch.nn.MultiheadAttention, lengths: list[int], steps: int, data: st.DataObject
) -> None:
    rows, widest = len(lengths), max(lengths) + data.draw(st.integers(0, 2))
    inputs = tensors(rows, widest + steps)
    session = layer.open(rows)
    first = {name: array[:, :widest] for name, array in inputs.items()}
    prefill = layer.append(session, {**first, "attention_mask": causal(rows, widest)}, batch_valid_length=lengths)
    got = [prefill.outputs["attn_out"]]
    for at in range(widest, widest + steps):
        step = {name: array[:, at : at + 1] for name, array in inputs.items()}
        got.append(layer.append(session, step, step=True).outputs["attn_out"])
    for row, length in enumerate(lengths):
        kept = [*range(length), *range(widest, widest + steps)]
        whole = {name: array[row : row + 1, kept] for name, array in inputs.items()}
        out, _ = expected(oracle, whole, causal(1, length + steps))
        np.testing.assert_allclose(np.concatenate(got, axis=1)[row, kept], out[0], atol=1e-4)
    layer.engine.delete_session(session)


# Cross-attention: keys and values that stay, queries that come alone


def test_a_cross_session_is_prefilled_once_and_asked_for_ever(
    layer: Served, oracle: torch.nn.MultiheadAttention
) -> None:
    """32 x 20 keys, asked 10 queries at once and one by one; the session stays where it is."""
    memory, asking = tensors(32, 20), tensors(32, 10, seed=1)
    mask = (np.random.default_rng(0).random((32, 10, 20)) < 0.7).astype(np.float32)
    mask[..., 0] = 1
    out, probabilities = expected(oracle, {**memory, "query": asking["query"]}, mask)
    session = layer.open(32)
    prefilled = layer.append(session, {name: memory[name] for name in ("key", "value")})
    assert (prefilled.outputs, prefilled.valid_length, prefilled.version) == ({}, [20] * 32, 1)
    blocks = layer.engine.session(session).blocks
    asked = layer.append(session, {"query": asking["query"], "attention_mask": mask}, Want(need_weights=True))
    assert (asked.past_length, asked.valid_length, asked.version) == ([20] * 32, [20] * 32, 1)
    np.testing.assert_allclose(asked.outputs["attn_out"], out, atol=1e-4)
    np.testing.assert_allclose(asked.outputs["attn_weights"], probabilities, atol=1e-5)
    for at in range(10):
        step = {"query": asking["query"][:, at : at + 1], "attention_mask": mask[:, at : at + 1]}
        stepped = layer.append(session, step, step=True, batch_valid_length=[20] * 32)
        np.testing.assert_allclose(stepped.outputs["attn_out"], out[:, at : at + 1], atol=1e-4)
    info = layer.engine.session(session)
    assert (info.valid_length, info.version, info.blocks) == ([20] * 32, 1, blocks)
    layer.engine.delete_session(session)


def test_queries_and_keys_of_other_numbers_in_one_append(layer: Served, oracle: torch.nn.MultiheadAttention) -> None:
    """A guide's own example: query (32, 10, H), key and value (32, 20, H), mask (32, 10, 20)."""
    memory, asking = tensors(32, 20), tensors(32, 10, seed=1)
    inputs, mask = {**memory, "query": asking["query"]}, np.ones((32, 10, 20), np.float32)
    session = layer.open(32)
    result = layer.append(session, {**inputs, "attention_mask": mask})
    assert (result.outputs["attn_out"].shape, result.valid_length) == ((32, 10, HIDDEN), [20] * 32)
    np.testing.assert_allclose(result.outputs["attn_out"], expected(oracle, inputs, mask)[0], atol=1e-4)
    layer.engine.delete_session(session)


def test_a_fork_of_a_cross_session_shares_its_keys(layer: Served) -> None:
    memory, asking = tensors(1, 20), tensors(1, 1, seed=1)
    session = layer.open()
    layer.append(session, {name: memory[name] for name in ("key", "value")})
    child = layer.engine.fork(session)[0].id
    outs = [layer.append(s, {"query": asking["query"]}, step=True).outputs["attn_out"] for s in (session, child)]
    np.testing.assert_array_equal(*outs)
    info = layer.engine.session(child)
    assert info.blocks == info.shared_blocks


@pytest.mark.parametrize("backend_name", ["cpu", "sdpa"])
def test_padding_of_a_layer_that_turns_by_position(backend_name: str) -> None:
    """Rows of 10 and 1 positions, then 2 and 3 more of the 4 given: padding would stand beyond the longest length."""
    torch.manual_seed(5)
    layer = MultiHeadAttention(HIDDEN, HEADS, compute_dtype=torch.float32).requires_grad_(False).eval()
    rotary = Rotary(*torch.randn(2, 12, HIDDEN // HEADS // 2).unbind(0))
    spec = attention_spec("turning", layer, kv_dtype="float32", max_length=12, fingerprint="", aligned=True)
    served = Served(ModelRunner(AttentionModel(spec, layer, rotary), backend(backend_name), 20, 16))
    session, inputs = served.open(2), tensors(2, 14)
    for start, stop, lengths in ((0, 10, [10, 1]), (10, 14, [12, 4])):
        chunk = {name: array[:, start:stop] for name, array in inputs.items()}
        mask = {"attention_mask": np.ones((2, stop - start, stop), np.float32)}
        got = served.append(session, {**chunk, **mask}, batch_valid_length=lengths).outputs["attn_out"]
    for row, kept in enumerate(([*range(12)], [0, 10, 11, 12])):
        whole = [torch.from_numpy(inputs[name][row : row + 1, kept]) for name in ("query", "key", "value")]
        out, _, _ = layer.stateless(*whole, rotary=rotary)
        appended = [at - 10 for at in kept if at >= 10]
        np.testing.assert_allclose(got[row, appended], out[0, -len(appended) :], atol=1e-4)


def test_a_fully_masked_query_attends_to_nothing(layer: Served, oracle: torch.nn.MultiheadAttention) -> None:
    inputs, mask = tensors(1, 4), causal(1, 4)
    mask[0, 2] = 0
    result = layer.append(layer.open(), {**inputs, "attention_mask": mask}, Want(need_weights=True)).outputs
    assert not result["attn_weights"][0, 2].any()
    np.testing.assert_allclose(result["attn_out"][0, 2], oracle.out_proj.bias.detach().numpy(), atol=1e-5)


def test_weights_come_per_head_or_averaged_with_the_past_in_use(
    layer: Served, oracle: torch.nn.MultiheadAttention
) -> None:
    inputs = tensors(1, 9)
    _, probabilities = expected(oracle, inputs, causal(1, 9))
    session = layer.open()
    layer.append(session, {**{name: array[:, :8] for name, array in inputs.items()}, "attention_mask": causal(1, 8)})
    step = {name: array[:, 8:] for name, array in inputs.items()}
    want = Want(need_weights=True, average_attn_weights=False)
    per_head = layer.append(session, step, want, step=True).outputs["attn_weights"]
    assert per_head.shape == (1, HEADS, 1, 9)
    np.testing.assert_allclose(per_head.mean(1), probabilities[:, 8:], atol=1e-5)


def test_a_mask_on_a_step_restricts_further(layer: Served, oracle: torch.nn.MultiheadAttention) -> None:
    inputs, mask = tensors(1, 6), causal(1, 6)
    mask[0, 5, :4] = 0
    out, _ = expected(oracle, inputs, mask)
    session = layer.open()
    first = {name: array[:, :5] for name, array in inputs.items()}
    layer.append(session, {**first, "attention_mask": mask[:, :5, :5]})
    step = {name: array[:, 5:] for name, array in inputs.items()}
    result = layer.append(session, {**step, "attention_mask": mask[:, 5:]}, step=True)
    np.testing.assert_allclose(result.outputs["attn_out"], out[:, 5:], atol=1e-4)


def test_truncate_then_append_equals_never_having_appended(layer: Served) -> None:
    inputs = tensors(1, 30)
    sessions = [layer.open(), layer.open()]
    for session, length in zip(sessions, (30, 17), strict=True):
        part = {name: array[:, :length] for name, array in inputs.items()}
        layer.append(session, {**part, "attention_mask": causal(1, length)})
    layer.finish(Truncate(sessions[0], 17))
    step = tensors(1, 1, seed=5)
    outs = [layer.append(session, step, step=True).outputs["attn_out"] for session in sessions]
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_float16_in_float16_out_over_a_float16_past(
    weights: Path, oracle: torch.nn.MultiheadAttention, dtype: str
) -> None:
    served = serve(weights, "cpu", dtype=dtype, kv_dtype="float16")
    inputs = {name: array.astype(np.float16) for name, array in tensors(1, 30).items()}
    out, _ = expected(oracle, {name: array.astype(np.float32) for name, array in inputs.items()}, causal(1, 30))
    got = served.append(served.open(), {**inputs, "attention_mask": causal(1, 30)}).outputs["attn_out"]
    assert got.dtype == np.float16
    tolerance = {"float32": 5e-3, "bfloat16": 3e-2}[dtype]  # 2**-11 of float16 values; 2**-8, thrice, of bfloat16's
    assert np.abs(got - out).max() <= tolerance * max(1.0, np.abs(out).max())


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"attention_mask": None}, "attention_mask", "required on prefill"),
        ({"attention_mask": causal(1, 4)[:, :, :3]}, "attention_mask", "T = past_length"),
        ({"attention_mask": causal(1, 4) * 0.5}, "attention_mask", "0 .masked. or 1"),
        ({"attention_mask": causal(1, 4) * 2}, "attention_mask", "values must be 0 to 1"),
        ({"key": np.zeros((1, 3, HIDDEN), np.float32)}, "key", "shape must be"),
        ({"value": np.zeros((1, 4, HIDDEN + 1), np.float32)}, "value", "shape must be"),
        ({"query": np.zeros((1, 4, HIDDEN), np.int64)}, "query", "dtype must be float16 or float32"),
        ({"query": np.full((1, 4, HIDDEN), np.nan, np.float32)}, "query", "NaN or infinite"),
        ({"value": None}, "value", "is required"),
    ],
)
def test_bad_input_names_its_field(layer: Served, change: dict[str, Any], field: str, message: str) -> None:
    inputs = {**tensors(1, 4), "attention_mask": causal(1, 4), **change}
    session = layer.open()
    with pytest.raises(InvalidInput, match=message) as caught:
        layer.append(session, {name: array for name, array in inputs.items() if array is not None})
    assert caught.value.field == field
    assert layer.engine.session(session).valid_length == [0]


def test_a_past_that_would_overflow_float16_is_refused_and_nothing_stays(weights: Path) -> None:
    served = serve(weights, "cpu", kv_dtype="float16")
    inputs, session = tensors(1, 2), served.open()
    inputs["value"] *= 1e6
    for asks in (inputs, {name: inputs[name] for name in ("key", "value")}):
        mask = {"attention_mask": causal(1, 2) * 0} if "query" in asks else {}
        with pytest.raises(InvalidInput, match="overflow the float16 past") as caught:
            served.append(session, {**asks, **mask})
        assert caught.value.field == "value"
    assert served.engine.session(session).valid_length == [0]


def test_an_output_that_its_dtype_cannot_hold_is_refused_and_nothing_stays(layer: Served) -> None:
    inputs, session = tensors(1, 2), layer.open()
    inputs["value"] *= 1e5
    mask = causal(1, 2)
    narrow = {**inputs, "query": inputs["query"].astype(np.float16), "attention_mask": mask}
    with pytest.raises(InvalidInput, match="the output overflows float16") as caught:
        layer.append(session, narrow)
    assert caught.value.field == "query"
    assert layer.engine.session(session).valid_length == [0]
    assert np.isfinite(layer.append(session, {**inputs, "attention_mask": mask}).outputs["attn_out"]).all()


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ("attention:hidden=10,heads=3", "hidden"),
        ("attention:hidden=0", "hidden"),
        ("attention:heads=x", "heads"),
        ("attention:depth=3", "model"),
        ("attention:weights=/nowhere.safetensors", "weights"),
        ("attention:dtype=int8", "dtype"),
    ],
)
def test_a_bad_spec_is_refused_by_name(spec: str, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        build("layer", spec, LoadOptions(CACHE), print)
    assert caught.value.field == field


def test_weights_of_another_size_are_refused_by_name(weights: Path) -> None:
    with pytest.raises(InvalidInput, match=r"proj\.\w+ must be"):
        build("layer", f"attention:hidden=32,heads=4,weights={weights}", LoadOptions(CACHE), print)


def test_seeded_weights_are_the_same_every_time() -> None:
    prints = [
        build("layer", f"attention:seed={seed}", LoadOptions(CACHE), print).model.spec.fingerprint for seed in (1, 1, 2)
    ]
    assert prints[0] == prints[1] != prints[2]
