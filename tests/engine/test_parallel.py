"""A layer cut over real processes is the uncut layer: outputs, pasts, probabilities, gradients."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.attention.base import Rotary
from engine.attention.dense import Past
from engine.attention.sdpa import SdpaBackend
from engine.errors import InvalidInput
from engine.layers import FeedForward, MultiHeadAttention
from engine.parallel import Parallel, divide
from tests.ranks import RankFailed, World

B, N_NEW, SLOTS, HIDDEN, HEADS = 4, 5, 12, 16, 8


@dataclass(frozen=True)
class Case:
    """One layer, and one call of it on a past of `past` positions a row."""

    options: dict[str, Any] = field(default_factory=dict)
    past: int = 0
    mask: str = "rows"  # rows (B, n, T), heads (B, heads, n, T), causal
    rotary: bool = False

    def layer(self) -> MultiHeadAttention:
        torch.manual_seed(1)
        wide = torch.float64  # so that an error is not taken for rounding
        layer = MultiHeadAttention(HIDDEN, HEADS, compute_dtype=wide, softmax_dtype=wide, **self.options).to(wide)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0, 0.5)
        return layer

    def call(self) -> dict[str, Any]:
        torch.manual_seed(2)
        heads, head_dim = self.options.get("kv_heads", HEADS), HIDDEN // HEADS
        widths = HIDDEN, self.options.get("kdim", HIDDEN), self.options.get("vdim", HIDDEN)
        query, key, value = (torch.randn(B, N_NEW, width, dtype=torch.float64, requires_grad=True) for width in widths)
        given: dict[str, Any] = {"query": query, "key": key, "value": value, "need_weights": True}
        if self.past:
            lengths = torch.arange(B) % self.past + 1
            keys, values = torch.randn(B, heads, head_dim, SLOTS), torch.randn(B, heads, SLOTS, head_dim)
            given["past"] = Past(keys.double(), values.double(), lengths)
        seen = SLOTS if self.past else N_NEW
        if self.mask == "causal":
            given["causal"] = True
        else:
            shape = (B, HEADS, N_NEW, seen) if self.mask == "heads" else (B, N_NEW, seen)
            given["attention_mask"] = (torch.rand(shape) < 0.7).float()
        if self.rotary:
            angles = torch.outer(torch.arange(float(SLOTS)), torch.tensor([0.3]))
            given["rotary"] = Rotary(angles.cos(), angles.sin())
        return given


CASES = {
    "plain": Case(),
    "on a past": Case(past=4, mask="heads"),
    "grouped, rotated": Case({"kv_heads": 4, "qk_norm": 1e-6, "qkv_bias": False}, past=3, mask="causal", rotary=True),
    "extra keys": Case({"bias_kv": True, "zero_attn": True, "kdim": 6, "vdim": 10, "output_bias": False}),
}
GRIDS = [(1, 2), (1, 4), (2, 2)]  # a grid smaller than the world of four is there twice
# Along which axis a parameter is cut; the others are whole on every rank.
CUTS = {f"{name}_proj.{part}": 0 for name in "qkv" for part in ("weight", "bias")}
CUTS |= {"o_proj.weight": 1, "bias_k": 0, "bias_v": 0}


def run(case: Case, grid: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """One call in training mode, and the gradients of a loss of it. `grid` None: uncut, in the test's own process."""
    layer, call = case.layer(), case.call()
    leaves = {name: call[name] for name in ("query", "key", "value")}
    if grid is not None:
        parallel = Parallel.grid(*grid)
        layer.shard(parallel)
        call = {name: on_rank(name, value, parallel) for name, value in call.items()}
        for parameter in layer.parameters():  # each rank has its own rows of the batch
            parameter.register_hook(parallel.data.add)  # type: ignore[no-untyped-call]
    torch.manual_seed(3)
    out, present, weights = layer.stateless(**call, average_attn_weights=False)
    if grid is not None:
        out = parallel.data.join(out, 0)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    leaves |= dict(layer.named_parameters())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    assert weights is not None
    results = {"out": out, "key": present.key, "value": present.value, "length": present.length, "weights": weights}
    results |= {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


def on_rank(name: str, value: Any, parallel: Parallel) -> Any:
    """What a call passes, cut for this rank: rows by `data`, the past's heads by `model`."""
    if isinstance(value, Past):
        key, item, length = (parallel.data.share(tensor, 0) for tensor in value)
        return Past(parallel.model.share(key, 1), parallel.model.share(item, 1), length)
    return parallel.data.split(value, 0) if isinstance(value, Tensor) else value


def assembled(name: str, parts: list[np.ndarray], data: int, model: int) -> np.ndarray:
    """The ranks' parts of one result put together again; what should be alike on ranks must be equal, bit by bit."""
    grid = [[parts[row * model + column] for column in range(model)] for row in range(data)]
    cut = 1 if name in ("key", "value") else CUTS.get(name.removeprefix("grad of "))
    if cut is None or name.endswith(("of key", "of value")):
        for row in grid:
            for part in row:
                np.testing.assert_array_equal(part, row[0])
        rows = [row[0] for row in grid]
    else:
        rows = [np.concatenate(row, cut) for row in grid]
    return np.concatenate(rows) if name in ("key", "value", "length", "weights") else rows[0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_cut_layer_is_the_uncut_one(world: World, case: str, grid: tuple[int, int]) -> None:
    expected = run(CASES[case], None)
    ranks = world.run(run, CASES[case], grid)
    for name, whole in expected.items():
        got = assembled(name, [rank[name] for rank in ranks], *grid)
        np.testing.assert_allclose(got, whole, atol=1e-6, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("grid", [(1, 2), (1, 4)], ids=str)
def test_ranks_that_are_seeded_alike_drop_what_one_would(world: World, grid: tuple[int, int]) -> None:
    case = Case({"attention_dropout": 0.4, "output_dropout": 0.3})
    expected, ranks = run(case, None), world.run(run, case, grid)
    got = assembled("out", [rank["out"] for rank in ranks], *grid)
    np.testing.assert_allclose(got, expected["out"], atol=1e-6)
    assert (expected["out"] == 0).mean() > 0.2


def feed_forward(activation: str, dtype: torch.dtype, packed: bool, mp: int) -> np.ndarray:
    """`mp` 0: uncut."""
    torch.manual_seed(1)
    layer = FeedForward(16, 32, activation, bias=True).to(dtype)
    x = torch.randn(7, 16).to(dtype)
    if mp:
        layer.shard(Parallel.grid(1, mp))
    if packed:
        layer.requires_grad_(False).pack()
    with torch.inference_mode():
        out: Tensor = layer(x, SdpaBackend())
    return out.float().numpy()


@pytest.mark.parametrize("activation", ["silu_gate", "gelu_tanh"])
@pytest.mark.parametrize(
    ("dtype", "packed", "error"),
    [
        (torch.float32, False, 1e-6),
        (torch.float32, True, 1e-6),
        (torch.bfloat16, True, 1e-2),
        (torch.float16, True, 1e-3),
    ],
    ids=str,
)
def test_a_cut_feed_forward_is_the_uncut_one(
    world: World, activation: str, dtype: torch.dtype, packed: bool, error: float
) -> None:
    expected = feed_forward(activation, dtype, packed, 0)
    for got in world.run(feed_forward, activation, dtype, packed, 4):
        np.testing.assert_allclose(got, expected, atol=error)


def too_many(dp: int, mp: int) -> None:
    MultiHeadAttention(16, 8, kv_heads=2).shard(Parallel.grid(dp, mp))


def test_a_grid_or_heads_that_do_not_fit_are_refused(world: World) -> None:
    with pytest.raises(RankFailed, match="InvalidInput: parallel_config: 2 x 4 ranks do not fit into the 4"):
        world.run(too_many, 2, 4)
    with pytest.raises(
        RankFailed,
        match="InvalidInput: model_parallel: the layer has heads 8, kv_heads 2; 4 does not divide kv_heads",
    ):
        world.run(too_many, 1, 4)


def test_what_does_not_divide_is_named_with_what_would() -> None:
    with pytest.raises(InvalidInput) as refused:
        divide("model_parallel", 2, "model smollm2-135m", heads=9, kv_heads=3, intermediate_size=1536)
    assert str(refused.value) == (
        "model_parallel: model smollm2-135m has heads 9, kv_heads 3, intermediate_size 1536; "
        "2 does not divide heads and kv_heads, but each of 1, 3 would"
    )
    divide("model_parallel", 3, "model smollm2-135m", heads=9, kv_heads=3, intermediate_size=1536)
