"""OpParallelConfig over real processes: every rank calls with the whole batch and gets what the uncut layer gives."""

from typing import Any

import numpy as np
import pytest
import torch

from engine.compat.mindspore import MultiHeadAttention, OpParallelConfig
from tests.ranks import RankFailed, World

B, S, HIDDEN, HEADS = 4, 6, 16, 8
GRIDS = [(1, 2), (2, 1), (1, 4), (4, 1), (2, 2)]


def layer(grid: tuple[int, int], **options: Any) -> MultiHeadAttention:
    torch.manual_seed(1)
    made = MultiHeadAttention(B, S, S, HIDDEN, HEADS, parallel_config=OpParallelConfig(*grid), **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5)
    return made


def trained(grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """One call in float32, flat inputs among them, and the gradients of a loss of it."""
    made = layer(grid, compute_dtype=torch.float32)
    torch.manual_seed(2)
    query, value = (torch.randn(B * S, HIDDEN, requires_grad=True) for _ in range(2))
    key = torch.randn(B, S, HIDDEN, requires_grad=True)
    mask = (torch.rand(B, S, S) < 0.7).float()
    out, (key_present, value_present) = made(query, key, value, mask)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + key_present.square().sum()
    leaves = {"query": query, "key": key, "value": value, **dict(made.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    results = {"out": out, "key_present": key_present, "value_present": value_present}
    results |= {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


def stepped(grid: tuple[int, int]) -> list[np.ndarray]:
    """A ragged prompt and two steps in float16, outputs and presents of each."""
    made = layer(grid, use_past=True)
    torch.manual_seed(3)
    keys, values = torch.zeros(B, HEADS, 2, S).half(), torch.zeros(B, HEADS, S, 2).half()
    lengths = torch.tensor([1, 4, 2, 3], dtype=torch.int32)
    real = torch.arange(S) < lengths[:, None, None]
    x, mask = torch.randn(B, S, HIDDEN), (torch.ones(S, S).tril() * real).half()
    results = []
    with torch.no_grad():
        for _ in range(3):
            out, (keys, values) = made(x, x, x, mask, keys, values, lengths)
            results += [out.float().numpy(), keys.float().numpy(), values.float().numpy()]
            made.add_flags_recursive(is_first_iteration=False)
            lengths = lengths + 1
            x, mask = torch.randn(B, 1, HIDDEN), torch.ones(B, 1, S).half()
    return results


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_cut_layer_is_the_uncut_one_with_whole_gradients_on_every_rank(world: World, grid: tuple[int, int]) -> None:
    expected = trained((1, 1))
    for rank in world.run(trained, grid):
        for name, whole in expected.items():
            np.testing.assert_allclose(rank[name], whole, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_steps_of_a_cut_layer_are_the_uncut_ones(world: World, grid: tuple[int, int]) -> None:
    expected = stepped((1, 1))
    for rank in world.run(stepped, grid):
        for got, whole in zip(rank, expected, strict=True):
            np.testing.assert_allclose(got, whole, rtol=1e-2, atol=1e-2)


def test_alone_nothing_is_cut() -> None:
    """No torch.distributed here: three ways for a batch of four, as in the original outside its parallel modes."""
    torch.testing.assert_close(layer((3, 2))(*_call())[0], layer((1, 1))(*_call())[0], rtol=0, atol=0)


def _call() -> list[torch.Tensor]:
    torch.manual_seed(4)
    return [*(torch.randn(B, S, HIDDEN) for _ in range(3)), torch.ones(B, S, S)]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((3, 1), "ValueError: batch_size: must be a multiple of data_parallel, 3, got 4"),
        ((1, 3), "ValueError: num_heads: must be a multiple of model_parallel, 3, got 8"),
        ((2, 4), "ValueError: parallel_config: .* needs 8 ranks, there are 4"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused(world: World, grid: tuple[int, int], message: str) -> None:
    with pytest.raises(RankFailed, match=message):
        world.run(trained, grid)
