"""The core itself against torch's layer: converted weights, torch's whole option space, forward and every gradient."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.dense import DenseView, Past
from engine.attention.mask import hiding
from engine.compat.convert import from_torch
from engine.layers import MultiHeadAttention
from tests.engine.compat.torch_cases import Case, assert_all_close, cases, gradients


def core_of(case: Case, layer: torch.nn.MultiheadAttention) -> MultiHeadAttention:
    options = case.options
    core = MultiHeadAttention(
        options["embed_dim"],
        options["num_heads"],
        kdim=options["kdim"],
        vdim=options["vdim"],
        qkv_bias=options["bias"],
        output_bias=options["bias"],
        bias_kv=options["add_bias_kv"],
        zero_attn=options["add_zero_attn"],
        compute_dtype=case.dtype,
        softmax_dtype=case.dtype,
    )
    weights = {name: tensor.detach().clone() for name, tensor in from_torch(layer.state_dict()).items()}
    core.to(case.dtype).load_state_dict(weights)
    return core.train(case.training)


def rows(case: Case, tensor: Tensor) -> Tensor:
    """From the case's layout to (B, n, width)."""
    return tensor[None] if case.batch is None else tensor if case.options["batch_first"] else tensor.transpose(0, 1)


def per_head(case: Case, mask: Tensor) -> Tensor:
    """torch's attn_mask as (B, heads, n, T)."""
    batch = case.batch or 1
    return (
        mask.expand(batch, case.heads, -1, -1) if mask.dim() == 2 else mask.reshape(batch, case.heads, *mask.shape[1:])
    )


def expected_gradients(layer: torch.nn.MultiheadAttention, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of torch's parameters, in our names and shapes."""
    of_inputs = {name: tensor for name, tensor in found.items() if name in ("query", "key", "value", "attn_mask")}
    return of_inputs | from_torch({name: found[name] for name, _ in layer.named_parameters()})


@settings(max_examples=150, deadline=None)
@given(case=cases(), with_past=st.booleans(), spare=st.integers(0, 2))
def test_every_option_gives_what_torch_gives(case: Case, with_past: bool, spare: int) -> None:
    layer, tensors = case.layer(), case.tensors()
    tensors.pop("key_padding_mask", None)  # for the core one mask says it all
    out, weights = layer(**tensors, **case.call)
    expected = gradients([out, weights], {**tensors, **dict(layer.named_parameters())})

    core = core_of(case, layer)
    query, key, value = (rows(case, tensors[name]) for name in ("query", "key", "value"))
    past = core.empty_past(case.batch or 1, case.keys + spare) if with_past else None
    slots = case.keys + spare if with_past else case.keys
    mask = tensors.get("attn_mask")
    if mask is None or mask.dtype == torch.bool:
        seen = None if mask is None else torch.nn.functional.pad(~per_head(case, mask), (0, slots - case.keys))
        got, present, got_weights = core.stateless(
            query,
            key,
            value,
            attention_mask=seen,
            past=past,
            need_weights=case.need_weights,
            average_attn_weights=case.average,
        )
    else:  # floats to add: not a mask of ours, but the view takes them
        bias = torch.nn.functional.pad(hiding(per_head(case, mask)), (0, slots - case.keys))
        view = DenseView(bias=bias, past=past, need_weights=case.need_weights)
        got = core(query, key, value, view)
        assert view.present is not None
        present, got_weights = view.present, view.weights
        if got_weights is not None and case.average:
            got_weights = got_weights.mean(1)

    if got_weights is not None:
        columns = [*range(case.keys), *range(slots, got_weights.shape[-1])]
        got_weights = got_weights[..., columns]
        if case.batch is None:
            got_weights = got_weights[0]
    got = got[0] if case.batch is None else got if case.options["batch_first"] else got.transpose(0, 1)
    assert_all_close({"out": got}, {"out": out}, case.dtype)
    assert (weights is None) == (got_weights is None)
    if weights is not None and got_weights is not None:
        assert_all_close({"weights": got_weights}, {"weights": weights}, case.dtype)
    found = gradients([got, got_weights], {**tensors, **dict(core.named_parameters())})
    assert_all_close(found, expected_gradients(layer, expected), case.dtype)
    _holds_the_projections(core, key, value, present)


def _holds_the_projections(core: MultiHeadAttention, key: Tensor, value: Tensor, present: Past) -> None:
    """The present is in MindSpore's layout: keys (B, heads, d, T), values (B, heads, T, d)."""
    n = key.shape[1]
    k, v = (proj(x).unflatten(-1, (core.heads, -1)) for proj, x in ((core.k_proj, key), (core.v_proj, value)))
    torch.testing.assert_close(present.key[..., :n], k.permute(0, 2, 3, 1))
    torch.testing.assert_close(present.value[:, :, :n], v.permute(0, 2, 1, 3))
    assert present.length.tolist() == [n] * len(key)
