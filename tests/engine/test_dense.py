"""The stateless call: a past of plain tensors in, a present out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.dense import Past
from engine.errors import InvalidInput, LengthExceeded
from engine.layers import MultiHeadAttention
from tests.engine.attending import attend_in_full, random_layer, rotary_tables

HIDDEN, HEADS, SLOTS = 12, 4, 14
EXACT: dict[str, Any] = {"compute_dtype": torch.float64, "softmax_dtype": torch.float64}

layer_options = st.fixed_dictionaries(
    {
        "kv_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([2, 4]),
        "qkv_bias": st.booleans(),
        "bias_kv": st.booleans(),
        "zero_attn": st.booleans(),
        "seed": st.integers(0, 9),
    }
)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def copied(past: Past) -> Past:
    return Past(*(tensor.clone() for tensor in past))


def unchanged(past: Past, before: Past) -> bool:
    return all(torch.equal(tensor, then) for tensor, then in zip(past, before, strict=True))


@settings(max_examples=40, deadline=None)
@given(options=layer_options, rotated=st.booleans(), in_place=st.booleans(), data=st.data())
def test_prefill_equals_any_chunks_of_it_in_ragged_rows(
    options: dict[str, Any], rotated: bool, in_place: bool, data: st.DataObject
) -> None:
    """Each row grows by a part of its own of every chunk, padding behind; steps are chunks of one."""
    layer = random_layer(HIDDEN, HEADS, **EXACT, **options)
    rotary = rotary_tables(2, SLOTS, torch.float64) if rotated else None
    whole, past = numbers(3, SLOTS, HIDDEN), layer.empty_past(3, SLOTS)
    outs: list[list[Tensor]] = [[], [], []]
    lengths = [0, 0, 0]
    for size in data.draw(st.lists(st.integers(1, 6), max_size=8), label="chunks"):
        new = [min(data.draw(st.integers(0, size)), SLOTS - length) for length in lengths]
        chunk = numbers(3, size, HIDDEN)
        for row, (length, count) in enumerate(zip(lengths, new, strict=True)):
            chunk[row, :count] = whole[row, length : length + count]
        lengths = [length + count for length, count in zip(lengths, new, strict=True)]
        out, past, _ = layer.stateless(
            chunk,
            chunk,
            chunk,
            past=past,
            batch_valid_length=torch.tensor(lengths),
            causal=True,
            rotary=rotary,
            in_place=in_place,
        )
        for row, count in enumerate(new):
            outs[row].append(out[row, :count])
    assert past.length.tolist() == lengths
    for row, length in enumerate(lengths):
        if length == 0:
            continue
        expected, _ = attend_in_full(layer, whole[row, :length], rotary)
        torch.testing.assert_close(torch.cat(outs[row]), expected)
        once = whole[row : row + 1, :length]
        at_once, present, _ = layer.stateless(once, once, once, causal=True, rotary=rotary)
        torch.testing.assert_close(at_once[0], expected)
        torch.testing.assert_close(past.key[row, ..., :length], present.key[0])
        torch.testing.assert_close(past.value[row, :, :length], present.value[0])
        assert not past.key[row, ..., length:].any()
        assert not past.value[row, :, length:].any()


@pytest.mark.parametrize("in_place", [False, True])
def test_keys_alone_then_queries_alone_are_cross_attention(in_place: bool) -> None:
    layer = random_layer(HIDDEN, HEADS, kdim=5, vdim=7, zero_attn=True, **EXACT)
    key, value, lengths = numbers(2, 6, 5), numbers(2, 6, 7), [6, 2]
    out, past, _ = layer.stateless(
        numbers(2, 0, HIDDEN), key, value, past=layer.empty_past(2, 9), batch_valid_length=torch.tensor(lengths)
    )
    assert out.shape == (2, 0, HIDDEN)
    before, query = copied(past), numbers(2, 3, HIDDEN)
    out, present, weights = layer.stateless(query, past=past, need_weights=True, in_place=in_place)
    assert unchanged(present, before)
    assert weights is not None
    for row, length in enumerate(lengths):
        keys, values = key[row, :length], value[row, :length]
        expected, probabilities = attend_in_full(layer, query[row], keys=keys, values=values)
        torch.testing.assert_close(out[row], expected)
        torch.testing.assert_close(weights[row, :, :length], probabilities.mean(0)[:, :length])
        torch.testing.assert_close(weights[row, :, 9:], probabilities.mean(0)[:, length:])
        assert not weights[row, :, length:9].any()


def test_without_a_past_the_mask_is_the_truth_and_the_length_says_what_is_kept() -> None:
    layer = random_layer(HIDDEN, HEADS, **EXACT)
    x, lengths = numbers(2, 5, HIDDEN), torch.tensor([3, 0])
    mask = torch.rand(2, 5, 5) < 0.5
    mask[..., 4] = True  # padding, and seen nevertheless
    out, present, _ = layer.stateless(x, x, x, attention_mask=mask, batch_valid_length=lengths)
    assert present.length.tolist() == [3, 0]
    assert present.key.shape == (2, HEADS, 3, 5)
    assert present.value.shape == (2, HEADS, 5, 3)
    projected = layer.k_proj(x).unflatten(-1, (HEADS, -1)).permute(0, 2, 3, 1)
    torch.testing.assert_close(present.key[0, ..., :3], projected[0, ..., :3])
    assert not present.key[0, ..., 3:].any()
    assert not present.key[1].any()
    assert not present.value[0, :, 3:].any()
    assert not present.value[1].any()
    for row in range(2):
        expected, _ = attend_in_full(layer, x[row], keys=x[row], values=x[row], hidden=~mask[row])
        torch.testing.assert_close(out[row], expected)


def test_a_mask_on_a_step_restricts_further_for_all_heads_or_each() -> None:
    layer = random_layer(HIDDEN, HEADS, **EXACT)
    x, past = numbers(1, 6, HIDDEN), layer.empty_past(1, 8)
    _, past, _ = layer.stateless(x[:, :5], x[:, :5], x[:, :5], past=past, causal=True)
    step = x[:, 5:]
    mask = torch.ones(1, 1, 8)
    mask[..., [0, 3]] = 0
    kept = x[0, [1, 2, 4, 5]]
    expected, _ = attend_in_full(layer, step[0], keys=kept, values=kept)
    out, _, _ = layer.stateless(step, step, step, past=past, attention_mask=mask)
    torch.testing.assert_close(out[0], expected)

    per_head = mask[:, None].repeat(1, HEADS, 1, 1)
    per_head[:, 1] = 1
    per_head[:, 2, :, :5] = 0
    _, _, weights = layer.stateless(
        step, step, step, past=past, attention_mask=per_head, need_weights=True, average_attn_weights=False
    )
    assert weights is not None
    seen = weights[0, :, 0] > 0
    assert seen[0].tolist() == seen[3].tolist() == [False, True, True, False, True, True, False, False]
    assert seen[1].tolist() == [True] * 6 + [False] * 2
    assert seen[2].tolist() == [False] * 5 + [True] + [False] * 2


@pytest.mark.parametrize("in_place", [False, True])
def test_slots_beyond_the_valid_length_are_never_read(in_place: bool) -> None:
    layer = random_layer(HIDDEN, HEADS, **EXACT)
    x, empty = numbers(2, 4, HIDDEN), layer.empty_past(2, 6)
    poisoned = Past(empty.key.clone().fill_(torch.nan), empty.value.clone().fill_(torch.nan), empty.length.clone())
    lengths = torch.tensor([4, 1])
    for part, valid in ((x, lengths), (x[:, :1], lengths + 1)):
        out, empty, _ = layer.stateless(part, part, part, past=empty, batch_valid_length=valid)
        got, poisoned, _ = layer.stateless(part, part, part, past=poisoned, batch_valid_length=valid, in_place=in_place)
        torch.testing.assert_close(got, out)
    if in_place:
        assert poisoned.key[0, ..., 5].isnan().all()
    else:
        assert unchanged(poisoned, empty)  # a present is zero there, whatever the past was


@pytest.mark.parametrize("past_slots", [None, 5])
def test_a_query_that_may_see_nothing_gives_zeros_and_finite_gradients(past_slots: int | None) -> None:
    layer = random_layer(HIDDEN, HEADS, **EXACT)
    past = None if past_slots is None else layer.empty_past(1, past_slots)
    x = numbers(1, 5, HIDDEN).requires_grad_()
    mask = torch.ones(1, 5, 5)
    mask[0, 2] = 0
    out, _, weights = layer.stateless(x, x, x, past=past, attention_mask=mask, need_weights=True)
    assert weights is not None
    assert not weights[0, 2].any()
    torch.testing.assert_close(out[0, 2], layer.o_proj.bias)
    torch.autograd.backward(out.square().sum())
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    first = torch.autograd.grad(layer.stateless(x, x, x, past=past, attention_mask=mask)[0][0, 2].sum(), x)[0]
    assert not first.any()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float32, 2e-6), (torch.float64, 1e-14)],
)
@pytest.mark.parametrize("past_dtype", [torch.float16, torch.float64])
def test_every_compute_dtype(dtype: torch.dtype, tolerance: float, past_dtype: torch.dtype) -> None:
    """Against float64 with the same weights; a float16 past costs its rounding, 2**-11 of each key and value."""
    exact = random_layer(HIDDEN, HEADS, bias_kv=True, **EXACT)
    layer = MultiHeadAttention(HIDDEN, HEADS, bias_kv=True, compute_dtype=dtype, softmax_dtype=exact.softmax_dtype)
    layer.eval().load_state_dict(exact.state_dict())
    exact.load_state_dict(layer.state_dict())  # float32's weights
    x, past = numbers(1, 7, HIDDEN), layer.empty_past(1, 7, past_dtype)
    _, past, _ = layer.stateless(x[:, :6], x[:, :6], x[:, :6], past=past, causal=True)
    out, past, _ = layer.stateless(x[:, 6:], x[:, 6:], x[:, 6:], past=past)
    assert out.dtype == dtype
    assert past.key.dtype == past.value.dtype == past_dtype
    assert past.length.dtype == torch.int32
    expected, _ = attend_in_full(exact, x[0])
    error = ((out[0].double() - expected[6:]) / expected[6:].abs().clamp(min=1)).abs().max()
    assert error <= (max(tolerance, 4e-3) if past_dtype == torch.float16 else tolerance)
    assert layer.stateless(x, x, x)[1].key.dtype == dtype


@pytest.mark.parametrize("softmax_dtype", [torch.float16, torch.float32])
def test_scores_that_pass_float16s_range_before_scaling(softmax_dtype: torch.dtype) -> None:
    layer = MultiHeadAttention(4, 1, softmax_dtype=softmax_dtype).eval()
    with torch.no_grad():
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            linear.weight.copy_(torch.eye(4))
            linear.bias.zero_()
    x = torch.tensor([[[250.0, 0, 0, 0], [0, 250.0, 0, 0]]])  # q.k = 62500 a channel, scaled 31250
    out, _, _ = layer.stateless(x * 1.1, x * 1.1, x)
    torch.testing.assert_close(out.float(), x)


def test_gradients_are_those_of_differences() -> None:
    layer = random_layer(4, 2, kv_heads=1, bias_kv=True, zero_attn=True, qk_norm=1e-6, **EXACT)
    rotary = rotary_tables(2, 5, torch.float64)
    mask = torch.ones(2, 2, 5)
    mask[0, 0, 1] = mask[1, 1] = 0
    names, parameters = zip(*layer.named_parameters(), strict=True)
    length = torch.tensor([2, 0])

    def call(x: Tensor, key: Tensor, value: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        out, present, weights = torch.func.functional_call(
            Stateless(layer),
            {f"layer.{name}": value for name, value in zip(names, parameters, strict=True)},
            (x, Past(key, value, length)),
            {
                "attention_mask": mask,
                "causal": True,
                "rotary": rotary,
                "need_weights": True,
                "batch_valid_length": torch.tensor([4, 1]),
            },
        )
        return out, present.key, present.value, weights

    inputs = (numbers(2, 2, 4), numbers(2, 1, 2, 5), numbers(2, 1, 5, 2), *(p.detach() for p in parameters))
    assert torch.autograd.gradcheck(call, [tensor.clone().requires_grad_() for tensor in inputs])


class Stateless(torch.nn.Module):
    """forward is the stateless call, as self-attention."""

    def __init__(self, layer: MultiHeadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, past: Past, **options: Any) -> tuple[Tensor, Past, Tensor | None]:
        return self.layer.stateless(x, x, x, past=past, **options)


def test_dropout_is_of_training_only() -> None:
    """One key: its probability is 1, so that what dropout leaves can be told exactly."""
    layer = random_layer(HIDDEN, HEADS, attention_dropout=0.5, output_dropout=0.25, **EXACT)
    x = numbers(64, 1, HIDDEN)
    out = layer.stateless(x, x, x)[0]
    assert torch.equal(layer.stateless(x, x, x)[0], out)
    layer.train()
    values = layer.v_proj(x)
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(HIDDEN))
        layer.o_proj.bias.zero_()
    ratio = layer.stateless(x, x, x)[0] / values
    kept = ratio.abs() > 1e-9
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 2 / 0.75))
    assert 0.25 < kept.double().mean() < 0.5  # (1 - 0.5)(1 - 0.25) = 0.375
    heads = kept.unflatten(-1, (HEADS, -1)).any(-1)
    assert 0.35 < heads.double().mean() < 0.65  # probabilities are dropped, a head at a time


CASES: dict[str, tuple[dict[str, Any], type[InvalidInput], str, str]] = {
    "full": ({"past_length": [3, 5]}, LengthExceeded, "batch_valid_length", "6 positions pass the past's 5 slots"),
    "too many": ({"n": 6}, LengthExceeded, "batch_valid_length", "6 positions pass"),
    "length beyond": ({"batch_valid_length": [1, 2]}, InvalidInput, "batch_valid_length", "past length . 0 to 1"),
    "length behind": (
        {"past_length": [1, 1], "batch_valid_length": [1, 0]},
        InvalidInput,
        "batch_valid_length",
        "past length . 0 to 1; that is .1, 1., got .1, 0.",
    ),
    "length of no past": (
        {"past": None, "batch_valid_length": [1, 2]},
        InvalidInput,
        "batch_valid_length",
        "past length",
    ),
    "lengths a row": ({"batch_valid_length": [1]}, InvalidInput, "batch_valid_length", r"must be \(2,\) int"),
    "length dtype": (
        {"batch_valid_length": [1.0, 1.0]},
        InvalidInput,
        "batch_valid_length",
        r"must be \(2,\) int, got \(2,\) torch.float32",
    ),
    "past length": ({"past_length": [0]}, InvalidInput, "past", r"length \(B,\) must be \(2,\)"),
    "past length dtype": ({"past_length": [0.0, 0.0]}, InvalidInput, "past", "int lengths"),
    "past key": ({"key_shape": (2, HEADS, 5, 3)}, InvalidInput, "past", r"key \(B, kv_heads, d, T\) must be"),
    "past value": ({"value_shape": (2, HEADS, 3, 5)}, InvalidInput, "past", r"value .* must be \(2, 4, 5, 3\)"),
    "past heads": ({"value_shape": (2, 1, 5, 3)}, InvalidInput, "past", r"value .* must be \(2, 4, 5, 3\)"),
    "no slots": (
        {"key_shape": (2, HEADS, 3, 0), "value_shape": (2, HEADS, 0, 3)},
        InvalidInput,
        "past",
        "a slot or more",
    ),
    "mask of the new": ({"attention_mask": torch.ones(2, 1, 1, 1, 1)}, InvalidInput, "attention_mask", "B, n, T"),
    "mask of other slots": ({"attention_mask": torch.ones(2, 1, 4)}, InvalidInput, "attention_mask", r"\(2, 1, 5\)"),
    "mask of other heads": (
        {"attention_mask": torch.ones(2, 3, 1, 5)},
        InvalidInput,
        "attention_mask",
        r"\(2, 4, 1, 5\)",
    ),
    "key alone": ({"value": None}, InvalidInput, "value", "come together"),
    "value alone": ({"key": None}, InvalidInput, "key", "come together"),
    "nothing to see": ({"past": None, "key": None, "value": None}, InvalidInput, "key", "give a key, or a past"),
    "value's length": ({"value": torch.zeros(2, 3, HIDDEN)}, InvalidInput, "value", "the key's 1 positions, got 3"),
    "query's rank": ({"query": torch.zeros(2, HIDDEN)}, InvalidInput, "query", "must be .B, n, 12"),
    "key's width": ({"key": torch.zeros(2, 1, HIDDEN + 1)}, InvalidInput, "key", "must be .B, n, 12"),
    "past's axes": ({"value_shape": (2,)}, InvalidInput, "past", "value .* must be"),
    "key's batch": ({"key": torch.zeros(3, 1, HIDDEN)}, InvalidInput, "key", "the query's B"),
    "rotary tables": ({"rotary": rotary_tables(2, 4)}, InvalidInput, "rotary", "end at 4 positions, and 5"),
    "rotary query": (
        {"rotary": rotary_tables(2, 5), "key": None, "value": None},
        InvalidInput,
        "rotary",
        "1 queries, but 0 keys",
    ),
    "in place of none": ({"past": None, "in_place": True}, InvalidInput, "past", "give one, as empty_past makes it"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_names_its_field_and_changes_nothing(case: str) -> None:
    options, error, field, message = CASES[case]
    options = dict(options)
    layer = random_layer(HIDDEN, HEADS)
    past = Past(
        torch.randn(options.pop("key_shape", (2, HEADS, 3, 5))),
        torch.randn(options.pop("value_shape", (2, HEADS, 5, 3))),
        torch.tensor(options.pop("past_length", [0, 0])),
    )
    before, x = copied(past), torch.randn(2, options.pop("n", 1), HIDDEN)
    if "batch_valid_length" in options:
        options["batch_valid_length"] = torch.tensor(options["batch_valid_length"])
    with pytest.raises(error, match=message) as caught:
        layer.stateless(**{"query": x, "key": x, "value": x, "past": past, **options})
    assert type(caught.value) is error
    assert caught.value.field == field
    assert unchanged(past, before)


def test_only_in_place_writes_the_past_it_was_given() -> None:
    layer = random_layer(HIDDEN, HEADS)
    past = layer.empty_past(2, 4)
    before, x = copied(past), torch.randn(2, 2, HIDDEN, requires_grad=True)
    out, present, _ = layer.stateless(x, x, x, past=past)
    assert unchanged(past, before)
    assert present.key.requires_grad
    again, written, _ = layer.stateless(x, x, x, past=past, in_place=True)
    assert written is past
    assert unchanged(past, present)
    assert not past.key.requires_grad
    torch.testing.assert_close(again, out)
