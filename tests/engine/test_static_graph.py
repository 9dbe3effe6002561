"""A step of fixed shape: one graph for every length, nothing read on the host, buffers that stay where they are."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from engine.attention.base import Rotary
from engine.attention.dense import Past
from engine.compat import mindspore
from engine.compat.convert import to_mindspore
from engine.layers import MultiHeadAttention
from tests.engine.attending import attend_in_full, random_layer, rotary_tables
from tests.pace import slow_but

HIDDEN, HEADS, SLOTS, STEPS = 16, 4, 220, 200
LENGTHS = [0, 3, 17]  # of each row, before the first step

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # (of the layer, of the call)
    "plain": ({}, {}),
    "biases-and-weights": (
        {"bias_kv": True, "zero_attn": True},
        {"need_weights": True, "average_attn_weights": False},
    ),
    "grouped-rotary": ({"kv_heads": 2, "head_dim": 6}, {"rotary": rotary_tables(6, SLOTS)}),
    "all": (
        {"kv_heads": 1, "bias_kv": True, "zero_attn": True, "qk_norm": 1e-6},
        {"rotary": rotary_tables(2, SLOTS), "need_weights": True},
    ),
}


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    """A graph of another test is none of this one's, and the other way round."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ragged_past(layer: MultiHeadAttention, history: Tensor, rotary: Rotary | None) -> Past:
    """Static buffers that hold the first LENGTHS[b] positions of row b of `history`."""
    past = layer.empty_past(len(LENGTHS), SLOTS)
    first = history[:, : max(LENGTHS)]
    layer.stateless(
        first, first, first, past=past, batch_valid_length=torch.tensor(LENGTHS), rotary=rotary, in_place=True
    )
    return past


def run_steps(step: Callable[..., Any], x: Tensor, history: Tensor) -> tuple[list[Tensor], list[Any]]:
    """200 steps of ragged rows through the static buffer x (B, 1, H): the first may compile, the others may not."""
    outs, weights = [], []
    for at in range(STEPS):
        x.copy_(torch.stack([history[row, length + at] for row, length in enumerate(LENGTHS)])[:, None])
        with torch.no_grad(), torch.compiler.set_stance("default" if at == 0 else "fail_on_recompile"):
            out, _, probabilities = step(x)
        outs.append(out.clone())
        weights.append(None if probabilities is None else probabilities.clone())
    return outs, weights


def check_self_attention(name: str, backend: str) -> None:
    layer_options, call = VARIANTS[name]
    layer, rotary = random_layer(HIDDEN, HEADS, **layer_options), call.get("rotary")
    history = torch.randn(len(LENGTHS), SLOTS, HIDDEN)
    past, twin = ragged_past(layer, history, rotary), ragged_past(layer, history, rotary)
    addresses = [tensor.data_ptr() for tensor in past]
    x = torch.empty(len(LENGTHS), 1, HIDDEN)

    def step(x: Tensor, past: Past) -> tuple[Tensor, Past, Tensor | None]:
        return layer.stateless(x, x, x, past=past, in_place=True, **call)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    outs, weights = run_steps(lambda x: compiled(x, past), x, history)
    plain, _ = run_steps(lambda x: step(x, twin), x, history)

    torch.testing.assert_close(outs, plain)
    assert past.length.tolist() == [length + STEPS for length in LENGTHS]
    assert [tensor.data_ptr() for tensor in past] == addresses
    for row, length in enumerate(LENGTHS):
        expected, probabilities = attend_in_full(layer, history[row, : length + STEPS], rotary)
        torch.testing.assert_close(torch.cat([out[row] for out in outs]), expected[length:], atol=1e-5, rtol=1e-4)
        if weights[0] is None:
            continue
        for at in (0, 1, STEPS - 1):  # per head or averaged; the layer's own keys are the last columns
            want = probabilities[:, length + at]
            got = weights[at][row].squeeze(-2)
            seen, own = length + at + 1, want.shape[-1] - length - STEPS
            want = want if got.dim() == 2 else want.mean(0)
            torch.testing.assert_close(got[..., :seen], want[..., :seen], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(got[..., SLOTS:], want[..., length + STEPS :], atol=1e-5, rtol=1e-4)
            assert got.shape[-1] == SLOTS + own
            assert not got[..., seen:SLOTS].any()


@pytest.mark.parametrize("name", slow_but(VARIANTS, {"all"}))
def test_two_hundred_steps_are_one_graph(name: str) -> None:
    check_self_attention(name, "eager")


def test_a_step_survives_functionalization() -> None:
    check_self_attention("all", "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("name", VARIANTS)
def test_two_hundred_steps_are_one_compiled_kernel(name: str) -> None:
    check_self_attention(name, "inductor")


def test_a_step_that_keeps_no_buffer_is_one_graph_too() -> None:
    """Pasts in, presents out: other tensors every time, of the same shape."""
    layer = random_layer(HIDDEN, HEADS)
    history = torch.randn(len(LENGTHS), SLOTS, HIDDEN)
    past = ragged_past(layer, history, None)
    compiled = torch.compile(layer.stateless, fullgraph=True, backend="eager")

    def step(x: Tensor) -> tuple[Tensor, Past, Tensor | None]:
        nonlocal past
        out, past, weights = compiled(x, x, x, past=past)
        return out, past, weights

    outs, _ = run_steps(step, torch.empty(len(LENGTHS), 1, HIDDEN), history)
    for row, length in enumerate(LENGTHS):
        expected, _ = attend_in_full(layer, history[row, : length + STEPS])
        torch.testing.assert_close(torch.cat([out[row] for out in outs]), expected[length:], atol=1e-5, rtol=1e-4)


def test_cross_attention_is_stepped_by_queries_alone_in_one_graph() -> None:
    layer = random_layer(HIDDEN, HEADS, kdim=6, vdim=10, bias_kv=True)
    lengths = torch.tensor([4, 9, 1])
    key, value = torch.randn(3, 9, 6), torch.randn(3, 9, 10)
    past = layer.empty_past(3, 12)
    layer.stateless(
        torch.empty(3, 0, HIDDEN), key, value, past=past, batch_valid_length=lengths, in_place=True
    )  # the encoder's, once
    kept = [tensor.clone() for tensor in past]
    compiled = torch.compile(layer.stateless, fullgraph=True, backend="eager")
    queries = torch.randn(3, STEPS + max(LENGTHS), HIDDEN)
    x = torch.empty(3, 1, HIDDEN)
    outs, _ = run_steps(lambda x: compiled(x, past=past, in_place=True), x, queries)
    assert all(torch.equal(tensor, before) for tensor, before in zip(past, kept, strict=True))
    for row, (first, valid) in enumerate(zip(LENGTHS, lengths.tolist(), strict=True)):
        steps = queries[row, first : first + STEPS]
        expected, _ = attend_in_full(layer, steps, keys=key[row, :valid], values=value[row, :valid])
        torch.testing.assert_close(torch.cat([out[row] for out in outs]), expected, atol=1e-5, rtol=1e-4)


def test_lengths_and_masks_may_be_static_buffers() -> None:
    """batch_valid_length counts the new token; a row that has ended keeps its length and writes nothing."""
    layer = random_layer(HIDDEN, HEADS)
    history = torch.randn(len(LENGTHS), SLOTS, HIDDEN)
    past = ragged_past(layer, history, None)
    lengths, mask = torch.tensor(LENGTHS, dtype=torch.int32), torch.ones(len(LENGTHS), 1, SLOTS)
    mask[:, :, 1] = 0  # a padding token inside the past, say
    ended = past.key[1].clone()
    grows = torch.tensor([1, 0, 1], dtype=torch.int32)

    def step(x: Tensor) -> tuple[Tensor, Past, Tensor | None]:
        lengths.add_(grows)
        return layer.stateless(x, x, x, past=past, batch_valid_length=lengths, attention_mask=mask, in_place=True)

    outs, _ = run_steps(torch.compile(step, fullgraph=True, backend="eager"), torch.empty(3, 1, HIDDEN), history)
    assert past.length.tolist() == lengths.tolist() == [LENGTHS[0] + STEPS, LENGTHS[1], LENGTHS[2] + STEPS]
    assert torch.equal(past.key[1], ended)
    whole = history[2, : LENGTHS[2] + STEPS]
    kept = [at for at in range(len(whole)) if at != 1]
    expected, _ = attend_in_full(layer, whole[-1:], keys=whole[kept], values=whole[kept])
    torch.testing.assert_close(outs[-1][2], expected, atol=1e-5, rtol=1e-4)


def test_mindspores_later_iterations_are_one_graph() -> None:
    """float16 pasts in, presents out, in the original's call."""
    plain = random_layer(HIDDEN, HEADS)
    layer = mindspore.MultiHeadAttention(len(LENGTHS), SLOTS, SLOTS, HIDDEN, HEADS, use_past=True)
    layer.load_state_dict(to_mindspore(plain.state_dict()))
    history = torch.randn(len(LENGTHS), SLOTS, HIDDEN)
    past = ragged_past(plain, history, None)
    pasts = past.key.half(), past.value.half()
    layer.add_flags_recursive(is_first_iteration=False)
    lengths, mask = torch.tensor(LENGTHS, dtype=torch.int32), torch.ones(len(LENGTHS), 1, SLOTS)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")

    def step(x: Tensor) -> tuple[Tensor, None, None]:
        nonlocal pasts
        lengths.add_(1)
        out, pasts = compiled(x, x, x, mask, *pasts, lengths)
        return out, None, None

    outs, _ = run_steps(step, torch.empty(len(LENGTHS), 1, HIDDEN), history)
    for row, length in enumerate(LENGTHS):
        expected, _ = attend_in_full(plain, history[row, : length + STEPS])
        got = torch.cat([out[row] for out in outs]).float()
        assert ((got - expected[length:]) / expected[length:].abs().clamp(min=1)).abs().max() < 1e-2


def step_of_everything(device: str, in_place: bool) -> None:
    with torch.device(device):
        layer = random_layer(HIDDEN, HEADS, kv_heads=2, bias_kv=True, zero_attn=True)
    past = layer.empty_past(3, 8, torch.float16)
    rotary = Rotary(torch.zeros(8, 2, device=device), torch.zeros(8, 2, device=device))
    x, mask = torch.zeros(3, 1, HIDDEN, device=device), torch.zeros(3, 1, 8, device=device)
    lengths = torch.zeros(3, dtype=torch.int32, device=device)
    variants: list[dict[str, Any]] = [{}, {"attention_mask": mask, "batch_valid_length": lengths, "need_weights": True}]
    for options in variants:
        for causal in (False, True):
            out, present, _ = layer.stateless(
                x, x, x, past=past, rotary=rotary, causal=causal, in_place=in_place, **options
            )
            assert out.device.type == device
            assert present is past
    layer.stateless(x, past=past, in_place=in_place)


def test_a_step_in_place_reads_nothing_on_the_host() -> None:
    """Neither meta tensors nor fake ones have values to read; a call that checks its lengths does read them."""
    step_of_everything("meta", in_place=True)
    with pytest.raises(NotImplementedError, match="meta"):
        step_of_everything("meta", in_place=False)
    with FakeTensorMode():
        step_of_everything("cpu", in_place=True)
        with pytest.raises(DataDependentOutputException):
            step_of_everything("cpu", in_place=False)


def test_a_position_beyond_the_last_slot_is_dropped_and_nothing_else_is_written() -> None:
    layer = random_layer(HIDDEN, HEADS)
    past = Past(torch.randn(3, HEADS, 4, 5), torch.randn(3, HEADS, 5, 4), torch.tensor([5, 4, 2]))
    before = [tensor.clone() for tensor in past]
    x = torch.randn(3, 2, HIDDEN)
    out, present, weights = layer.stateless(x, x, x, past=past, in_place=True, need_weights=True)
    assert present is past
    assert past.length.tolist() == [5, 5, 4]
    untouched = torch.arange(5) < torch.tensor([[5], [4], [2]])
    untouched |= torch.arange(5) >= torch.tensor([[5], [5], [4]])
    for row in range(3):
        torch.testing.assert_close(
            past.key[row, ..., untouched[row]], before[0][row, ..., untouched[row]], rtol=0, atol=0
        )
        torch.testing.assert_close(
            past.value[row, :, untouched[row]], before[1][row, :, untouched[row]], rtol=0, atol=0
        )
        assert not torch.equal(past.key[row], before[0][row]) or row == 0
    projected = layer.k_proj(x).view(3, 2, HEADS, 4)
    torch.testing.assert_close(past.key[1, :, :, 4], projected[1, 0])
    torch.testing.assert_close(past.key[2, :, :, 2:4], projected[2].permute(1, 2, 0))
    assert out.isfinite().all()
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2))
