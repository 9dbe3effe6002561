"""The drop-in with a past, against torch's own layer over the whole sequence: forward and every gradient."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.dense import Past
from engine.compat.torch import MultiheadAttention
from engine.errors import InvalidInput, LengthExceeded
from tests.engine.compat.torch_cases import Case, assert_all_close, cases, gradients, splits

SIZE, HEADS = 8, 2


def twins(case: Case, **options: Any) -> tuple[MultiheadAttention, torch.nn.MultiheadAttention]:
    theirs = case.layer()
    ours = MultiheadAttention(**case.options).train(case.training)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def parameters(layer: torch.nn.Module) -> dict[str, Tensor]:
    return dict(layer.named_parameters())


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_over_an_empty_past_every_option_gives_what_torch_gives(case: Case) -> None:
    """The past has as many slots as there are keys, so that torch's masks fit."""
    ours, theirs = twins(case)
    tensors = case.tensors()
    out, weights = theirs(**tensors, **case.call)
    expected = gradients([out, weights], {**tensors, **parameters(theirs)})
    got, got_weights, present = ours(**tensors, **case.call, past=ours.empty_past(case.batch or 1, case.keys))
    assert got.dtype == out.dtype
    assert (got_weights is None) == (weights is None)
    found = {"out": got} if weights is None else {"out": got, "weights": got_weights}
    assert_all_close(found, {"out": out} if weights is None else {"out": out, "weights": weights}, case.dtype)
    assert_all_close(gradients([got, got_weights], {**tensors, **parameters(ours)}), expected, case.dtype)
    assert present.length.tolist() == [case.keys] * (case.batch or 1)


def sequence(case: Case, length: int) -> dict[str, Tensor]:
    """`length` positions of everything, in the case's layout, wanting gradients."""
    generator = torch.Generator().manual_seed(case.seed)
    size, found = case.options["embed_dim"], {}
    for name, width in (("query", size), ("key", case.options["kdim"]), ("value", case.options["vdim"])):
        x = torch.randn(case.batch or 1, length, width or size, generator=generator, dtype=case.dtype)
        found[name] = x[0] if case.batch is None else x if case.options["batch_first"] else x.transpose(0, 1)
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in found.items()}


def axis(case: Case) -> int:
    """Where positions are."""
    return 1 if case.batch is not None and case.options["batch_first"] else 0


def part(case: Case, tensors: dict[str, Tensor], at: slice) -> dict[str, Tensor]:
    return {name: tensor.narrow(axis(case), at.start, at.stop - at.start) for name, tensor in tensors.items()}


@settings(max_examples=100, deadline=None)
@given(case=cases(), length=st.integers(1, 9), data=st.data(), spare=st.integers(0, 3))
def test_any_split_of_a_causal_sequence_is_the_whole(case: Case, length: int, data: st.DataObject, spare: int) -> None:
    ours, theirs = twins(case)
    tensors = sequence(case, length)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    out, weights = theirs(**tensors, attn_mask=mask, average_attn_weights=case.average)
    expected = gradients([out], {**tensors, **parameters(theirs)})
    past, outs = ours.empty_past(case.batch or 1, length + spare), []
    for at in data.draw(splits(length)):
        got, rows, past = ours(**part(case, tensors, at), is_causal=True, average_attn_weights=case.average, past=past)
        outs.append(got)
        assert past.length.tolist() == [at.stop] * (case.batch or 1)
        # The slots that hold something, and the layer's own keys, which come last.
        columns = [*range(length), *range(length + spare, rows.shape[-1])]
        assert_all_close({"weights": rows[..., columns]}, {"weights": weights[..., at, :]}, case.dtype)
        assert not rows[..., at.stop : length + spare].any()
    got = torch.cat(outs, axis(case))
    assert_all_close({"out": got}, {"out": out}, case.dtype)
    assert_all_close(gradients([got], {**tensors, **parameters(ours)}), expected, case.dtype)


@settings(max_examples=50, deadline=None)
@given(case=cases(), data=st.data())
def test_rows_of_different_lengths_go_their_own_ways(case: Case, data: st.DataObject) -> None:
    """Padded chunks with a batch_valid_length; each row must equal torch's layer over that row alone."""
    batch = case.batch or 1
    ours, theirs = twins(case)
    lengths = torch.zeros(batch, dtype=torch.int64)
    past, rows = ours.empty_past(batch, 12), [[] for _ in range(batch)]  # type: ignore[var-annotated]
    expected_in: list[list[dict[str, Tensor]]] = [[] for _ in range(batch)]
    for seed in range(data.draw(st.integers(1, 3))):
        n = data.draw(st.integers(1, 4))
        new = data.draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch))
        chunk = sequence(case.__class__(**{**vars(case), "seed": seed}), n)
        lengths = lengths + torch.tensor(new)
        out, _, past = ours(**chunk, is_causal=True, past=past, batch_valid_length=lengths)
        assert past.length.tolist() == lengths.tolist()
        for row, count in enumerate(new):
            own = {name: _row(case, tensor, row)[:count] for name, tensor in chunk.items()}
            expected_in[row].append(own)
            rows[row].append(_row(case, out, row)[:count])
    for row, length in enumerate(lengths.tolist()):
        if length:
            whole = {name: torch.cat([own[name] for own in expected_in[row]]) for name in ("query", "key", "value")}
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)
            out, _ = theirs(**whole, attn_mask=mask)
            assert_all_close({"out": torch.cat(rows[row])}, {"out": out}, case.dtype)
        assert not past.key[row, ..., length:].any()
        assert not past.value[row, :, length:].any()


def _row(case: Case, tensor: Tensor, row: int) -> Tensor:
    """(positions, width) of one row."""
    return tensor if case.batch is None else tensor[row] if case.options["batch_first"] else tensor[:, row]


@settings(max_examples=75, deadline=None)
@given(case=cases(), steps=st.integers(1, 3))
def test_a_source_that_stays_is_stepped_with_queries_alone(case: Case, steps: int) -> None:
    ours, theirs = twins(case)
    tensors = case.tensors()
    source = {name: tensors[name] for name in ("key", "value")}
    masks = {name: tensor for name, tensor in tensors.items() if name.endswith("mask") and not case.is_causal}
    weighing = {"need_weights": case.need_weights, "average_attn_weights": case.average}
    empty = ours.empty_past(case.batch or 1, case.keys)
    _, _, past = ours(tensors["query"].detach().narrow(axis(case), 0, 1), **source, past=empty)
    outs: list[Tensor | None] = []
    gots: list[Tensor | None] = []
    for step in range(steps):
        outs += [*theirs(tensors["query"] * (step + 1), **source, **masks, **weighing)]
        got, got_weights, present = ours(tensors["query"] * (step + 1), **masks, **weighing, past=past)
        assert all(torch.equal(new, old) for new, old in zip(present, past, strict=True))
        gots += [got, got_weights]
    found, expected = ({str(i): x for i, x in enumerate(some) if x is not None} for some in (gots, outs))
    assert_all_close(found, expected, case.dtype)
    assert_all_close(
        gradients(gots, {**tensors, **parameters(ours)}),
        gradients(outs, {**tensors, **parameters(theirs)}),
        case.dtype,
    )


def small(**options: Any) -> MultiheadAttention:
    torch.manual_seed(3)
    return MultiheadAttention(SIZE, HEADS, batch_first=True, **options)


def test_dropout_of_probabilities_falls_where_torchs_does() -> None:
    """One generator, drawn from in the same order: the same probabilities are dropped and scaled."""
    ours = small(dropout=0.4)
    theirs = torch.nn.MultiheadAttention(SIZE, HEADS, batch_first=True, dropout=0.4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, SIZE)
    torch.manual_seed(9)
    out, weights = theirs(x, x, x, average_attn_weights=False)
    torch.manual_seed(9)
    got, got_weights, _ = ours(x, x, x, average_attn_weights=False, past=ours.empty_past(3, 7))
    assert (weights == 0).any()
    torch.testing.assert_close(got, out)
    torch.testing.assert_close(got_weights, weights)
    ours.eval()
    torch.testing.assert_close(ours(x, x, x, past=ours.empty_past(3, 7))[0], theirs.eval()(x, x, x)[0])


def test_gradients_flow_into_the_past() -> None:
    layer = small().double()
    empty = layer.empty_past(1, 4)
    x = torch.randn(1, 2, SIZE, dtype=torch.float64)
    filled = layer(x, x, x, past=empty)[2]

    def step(key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = layer(x[:, :1], x[:, :1], x[:, :1], past=Past(key, value, filled.length))[0]
        return out

    past = [tensor.detach().requires_grad_() for tensor in (filled.key, filled.value)]
    assert torch.autograd.gradcheck(step, past)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_in_it_and_sums_in_float32(dtype: torch.dtype) -> None:
    layer = small().eval()
    x = torch.randn(2, 6, SIZE)
    expected = layer(x, x, x)[0]
    layer = layer.to(dtype)
    out, weights, present = layer(*[x.to(dtype)] * 3, past=layer.empty_past(2, 6))
    assert {out.dtype, weights.dtype, present.key.dtype, present.value.dtype} == {dtype}
    torch.testing.assert_close(out.float(), expected, atol=4 * torch.finfo(dtype).eps, rtol=0.05)


def test_autocast_is_torchs() -> None:
    layer = small().eval()
    x = torch.randn(2, 6, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x, x, x)[0]
        out = layer(x, x, x, past=layer.empty_past(2, 6))[0]
        again = layer(*[x.bfloat16()] * 3, past=layer.empty_past(2, 6))[0]
    assert out.dtype == again.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(again, expected, atol=2e-2, rtol=2e-2)


def test_a_query_that_may_see_nothing_gives_the_output_bias() -> None:
    layer = small()
    with torch.no_grad():
        layer.out_proj.bias.normal_()
    x = torch.randn(2, 3, SIZE)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1] = True
    out, weights, _ = layer(x, x, x, attn_mask=mask, past=layer.empty_past(2, 3))
    torch.testing.assert_close(out[:, 1], layer.out_proj.bias.expand(2, SIZE))
    assert not weights[:, 1].any()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), list(layer.parameters())))
    out = layer(x, past=layer.empty_past(2, 3))[0]  # a past of nothing
    torch.testing.assert_close(out, layer.out_proj.bias.expand(2, 3, SIZE))


X = torch.randn(2, 3, SIZE)
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"value": None}, "value", "come together"),
    ({"key": None}, "key", "come together"),
    ({"key": X[0]}, "key", "all 3-D or all 2-D"),
    ({"query": X[:, :, :7]}, "query", r"\(B, n, 8\) with the query's B, got \(2, 3, 7\)"),
    ({"key": X[:1]}, "key", r"the query's B, got \(1, 3, 8\)"),
    ({"query": X[None]}, "query", "all 3-D or all 2-D"),
    ({"value": X[:, :2]}, "value", "the key's 3 positions, got 2"),
    ({"query": X.half()}, "query", "the layer's dtype torch.float32, got torch.float16"),
    ({"attn_mask": torch.zeros(3, 3, dtype=torch.int64)}, "attn_mask", "bool .* or floats"),
    ({"attn_mask": torch.zeros(3, 3, dtype=torch.bool)}, "attn_mask", r"\(3, 5\) or \(4, 3, 5\) for a past of 5 slots"),
    ({"attn_mask": torch.zeros(2, 3, 5)}, "attn_mask", r"\(4, 3, 5\)"),
    ({"key_padding_mask": torch.zeros(2, 3)}, "key_padding_mask", r"\(2, 5\) for a past of 5 slots"),
    ({"batch_valid_length": torch.tensor([3, 4])}, "batch_valid_length", "past length . 0 to 3"),
]


@pytest.mark.parametrize(("change", "field", "message"), REFUSED)
def test_a_wrong_argument_is_refused_by_name(change: dict[str, Any], field: str, message: str) -> None:
    layer = small()
    with pytest.raises(InvalidInput, match=message) as caught:
        layer(**{"query": X, "key": X, "value": X, **change}, past=layer.empty_past(2, 5))
    assert caught.value.field == field


def test_a_past_of_another_layer_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"past: its key .* must be \(2, 2, 4, 5\), got \(2, 4, 2, 5\)"):
        small()(X, X, X, past=MultiheadAttention(SIZE, 4).empty_past(2, 5))


def test_a_full_past_is_refused() -> None:
    layer = small()
    past = layer(X, X, X, past=layer.empty_past(2, 4))[2]
    with pytest.raises(LengthExceeded, match="6 positions pass the past's 4 slots"):
        layer(X, X, X, past=past)
    with pytest.raises(LengthExceeded, match="3 positions pass the past's 2 slots"):
        layer(X, X, X, past=layer.empty_past(2, 2))


def test_what_is_set_on_the_layer_counts_at_the_next_call() -> None:
    layer = small(dropout=0.5)
    layer(X, X, X, past=layer.empty_past(2, 3))
    layer.dropout = 0.0
    with torch.no_grad():
        layer.out_proj.weight.mul_(2)
    torch.testing.assert_close(layer(X, X, X, past=layer.empty_past(2, 3))[0], layer(X, X, X)[0])
