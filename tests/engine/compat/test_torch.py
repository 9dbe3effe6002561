"""The drop-in for torch.nn.MultiheadAttention. Without a past it is torch's own layer, bit for bit."""

import copy
import inspect
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from engine.compat.torch import MultiheadAttention
from tests.engine.compat.torch_cases import Case, cases, gradients

SIZE, HEADS = 8, 2


def twins(**options: Any) -> tuple[MultiheadAttention, torch.nn.MultiheadAttention]:
    """Ours and torch's, made alike."""
    torch.manual_seed(1)
    ours = MultiheadAttention(SIZE, HEADS, **options)
    torch.manual_seed(1)
    return ours, torch.nn.MultiheadAttention(SIZE, HEADS, **options)


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)


def test_the_constructor_and_the_call_are_torchs() -> None:
    assert inspect.signature(MultiheadAttention) == inspect.signature(torch.nn.MultiheadAttention)
    call = list(inspect.signature(MultiheadAttention.forward).parameters.values())
    theirs = list(inspect.signature(torch.nn.MultiheadAttention.forward).parameters.values())
    assert [parameter.name for parameter in call[: len(theirs)]] == [parameter.name for parameter in theirs]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in call[len(theirs) :])
    assert [p.default for p in call[4:9]] == [p.default for p in theirs[4:]]


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 5, "vdim": 3}, {"add_bias_kv": True, "add_zero_attn": True}, {"batch_first": True}],
)
def test_parameters_attributes_and_text_are_torchs(options: dict[str, Any]) -> None:
    ours, theirs = twins(**options, dropout=0.25)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(ours.state_dict(), theirs.state_dict())
    assert {name for name in vars(ours) if name != "training"} == {name for name in vars(theirs) if name != "training"}
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(("size", "heads", "error"), [(0, 1, ValueError), (8, 0, ValueError), (8, 3, AssertionError)])
def test_a_wrong_constructor_fails_as_torchs(size: int, heads: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        torch.nn.MultiheadAttention(size, heads)
    with pytest.raises(error):
        MultiheadAttention(size, heads)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_without_a_past_it_is_torchs_layer(case: Case) -> None:
    theirs, tensors = case.layer(), case.tensors()
    ours = MultiheadAttention(**case.options).train(case.training)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (ours, theirs):
        out, weights = layer(**tensors, **case.call)
        results.append((out, weights, gradients([out, weights], {**tensors, **dict(layer.named_parameters())})))
    assert_same(results[0], results[1])


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_falls_where_torchs_does(need_weights: bool) -> None:
    ours, theirs = twins(dropout=0.5)
    x, results = torch.randn(6, 3, SIZE), []
    for layer in (ours, theirs):
        torch.manual_seed(2)
        results.append(layer(x, x, x, need_weights=need_weights))
    assert_same(results[0], results[1])
    assert not torch.equal(ours(x, x, x)[0], results[0][0])


def operators(layer: torch.nn.Module, *inputs: Tensor) -> set[str]:
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        layer(*inputs)
    return {event.name for event in profile.function_events}


def test_the_fast_path_is_taken_where_torch_takes_it() -> None:
    ours, theirs = twins(batch_first=True)
    x = torch.randn(2, 5, SIZE)
    for layer in (ours.eval(), theirs.eval()):
        assert "aten::_native_multi_head_attention" in operators(layer, x, x, x)
        assert "aten::_native_multi_head_attention" not in operators(layer, x, x.clone(), x)


def test_nested_tensors_pass_as_through_torchs() -> None:
    ours, theirs = twins(batch_first=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        x = torch.nested.nested_tensor([torch.randn(3, SIZE), torch.randn(5, SIZE)])
        got, expected = (layer.eval()(x, x, x, need_weights=False)[0] for layer in (ours, theirs))
        assert_same(got.unbind(), expected.unbind())


def test_it_is_copied_pickled_saved_and_moved_as_torchs() -> None:
    ours, theirs = twins(batch_first=True, add_bias_kv=True)
    x = torch.randn(2, 3, SIZE)
    expected = theirs(x, x, x)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    for again in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(stream, weights_only=False),
    ):
        assert type(again) is MultiheadAttention
        assert_same(again(x, x, x), expected)
        again(x, x, x, past=again.empty_past(2, 3))
    assert_same(ours.half()(*[x.half()] * 3), theirs.half()(*[x.half()] * 3))
    assert ours.to("meta").out_proj.weight.is_meta


def test_it_serves_in_torchs_own_layers() -> None:
    torch.manual_seed(4)
    theirs = torch.nn.TransformerDecoderLayer(SIZE, HEADS, 16, batch_first=True).eval()
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        layer = MultiheadAttention(SIZE, HEADS, dropout=0.1, batch_first=True).eval()
        layer.load_state_dict(getattr(theirs, name).state_dict())
        setattr(ours, name, layer)
    x, memory = torch.randn(2, 5, SIZE), torch.randn(2, 3, SIZE)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    got, expected = (layer(x, memory, tgt_mask=mask, tgt_is_causal=True) for layer in (ours, theirs))
    assert_same(got, expected)


def test_scripted_and_compiled_it_gives_the_same() -> None:
    ours, theirs = twins(batch_first=True)
    x = torch.randn(2, 3, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(ours)
    assert_same(scripted(x, x, x), theirs(x, x, x))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same(compiled(x, x, x), theirs(x, x, x))
    with torch.no_grad():  # the core is made for each call, outside the graph
        out = torch.compile(ours, backend="eager")(x, x, x, past=ours.empty_past(2, 3))[0]
    torch.testing.assert_close(out, theirs(x, x, x)[0])


@pytest.mark.parametrize("missing", ["key", "value"])
def test_without_a_past_key_and_value_are_required(missing: str) -> None:
    ours, _ = twins()
    inputs: dict[str, Any] = {name: torch.randn(2, 1, SIZE) for name in ("query", "key", "value")}
    with pytest.raises(TypeError, match="key and value are required"):
        ours(**{**inputs, missing: None})
    with pytest.raises(TypeError, match="batch_valid_length"):
        ours(**inputs, batch_valid_length=torch.tensor([1]))


def test_threads_may_share_a_layer() -> None:
    ours, theirs = twins(batch_first=True)
    inputs = [torch.randn(1, n % 7 + 1, SIZE) for n in range(64)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: ours(x, x, x, past=ours.empty_past(1, x.shape[1]))[0], inputs))
    for x, out in zip(inputs, got, strict=True):
        torch.testing.assert_close(out, theirs(x, x, x)[0])
