"""A layer cut over processes: the grid of ranks, and what goes between them.

A linear is cut in one of two ways (Shoeybi et al. 2019, Megatron-LM). By rows: each rank has the whole input and gives
its share of the output. By columns: each rank has its share of the input and gives a partial sum of the whole output.
Rows, then columns, cost one all-reduce. In training the gradients need the mirror of it:

              forward                    backward
    copy      nothing                    the ranks' gradients are added
    sum       the partial sums are added nothing
    split     this rank's share is taken the shares are joined
    join      the shares are joined      this rank's share is taken

Sums are float32 at least. The order of summation differs from the uncut layer's, and nothing else does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh

from engine.errors import InvalidInput

Move = Callable[[Tensor], Tensor]


class CollectiveFailed(RuntimeError):
    """A rank did not come, or came and left: what the others hold is not alike any more."""


def divide(field: str, parts: int, whose: str, **sizes: int) -> None:
    """Raises InvalidInput about `field` unless `parts` divides every size."""
    wrong = [name for name, size in sizes.items() if size % parts]
    if wrong:
        common = math.gcd(*sizes.values())
        possible = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        has = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InvalidInput(
            field, f"{whose} has {has}; {parts} does not divide {' and '.join(wrong)}, but each of {possible} would"
        )


class Ranks:
    """The processes along one side of the grid, as one of them sees them: it is number `rank` of `size`."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._group = group

    def share(self, whole: Tensor, axis: int) -> Tensor:
        """This rank's part of the axis, which `size` divides; a copy, so that the whole can be let go."""
        return whole.chunk(self.size, axis)[self.rank].clone(memory_format=torch.contiguous_format)

    def share_like(self, whole: Tensor, own: torch.Size) -> Tensor:
        """This rank's part, of the shape `own`, of a tensor that is cut along one axis or none."""
        axis = _cut_axis(whole, own)
        return whole if axis is None else self.share(whole, axis)

    def split_like(self, whole: Tensor, own: torch.Size) -> Tensor:
        """`share_like`, differentiable: each rank gets the gradient of the whole."""
        axis = _cut_axis(whole, own)
        return whole if axis is None else self.split(whole, axis)

    def copy(self, x: Tensor) -> Tensor:
        """x is the same on every rank, and each does something else with it."""
        return _move(x, _same, self.add)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, on every rank."""
        return _move(x, self.add, _same)

    def split(self, x: Tensor, axis: int) -> Tensor:
        """This rank's part of what every rank has."""
        return _move(x, lambda whole: self.share(whole, axis), lambda part: self.gather(part, axis))

    def join(self, x: Tensor, axis: int) -> Tensor:
        """Every rank's part, side by side, on every rank."""
        return _move(x, lambda part: self.gather(part, axis), lambda whole: self.share(whole, axis))

    def add(self, x: Tensor) -> Tensor:
        """`sum`, not differentiable. Raises CollectiveFailed."""
        total = x.to(torch.promote_types(x.dtype, torch.float32), copy=True).contiguous()
        self._run(lambda: dist.all_reduce(total, group=self._group))
        return total.to(x.dtype)

    def gather(self, x: Tensor, axis: int) -> Tensor:
        """`join`, not differentiable. Raises CollectiveFailed."""
        own = x.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._run(lambda: dist.all_gather(parts, own, group=self._group))
        return torch.cat(parts, axis)

    def _run(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise CollectiveFailed(f"the ranks are not together any more: {error}") from error


@dataclass(frozen=True)
class Parallel:
    """This process's place in a grid of data_parallel x model_parallel ranks: along `data` each rank has the same
    weights and its own rows of a batch, along `model` the same rows and its own part of the weights."""

    data: Ranks
    model: Ranks

    @classmethod
    def grid(cls, data_parallel: int, model_parallel: int, device: str = "cpu") -> "Parallel":
        """Over torch.distributed's world, all of whose ranks must call it. A world that is larger repeats the grid.

        Raises InvalidInput for a grid that does not fit the world.
        """
        world, ranks = dist.get_world_size(), data_parallel * model_parallel
        if world % ranks:
            grid = f"{data_parallel} x {model_parallel} ranks"
            raise InvalidInput("parallel_config", f"{grid} do not fit into the {world} that torch.distributed has")
        names = ("repeat", "data", "model")
        shape = (world // ranks, data_parallel, model_parallel)
        mesh = init_device_mesh(device, shape, mesh_dim_names=names)
        data, model = (Ranks(mesh.get_group(axis), mesh.get_local_rank(axis), shape[axis]) for axis in (1, 2))
        return cls(data, model)


def _cut_axis(whole: Tensor, own: torch.Size) -> int | None:
    sizes = enumerate(zip(whole.shape, own, strict=True))
    return next((axis for axis, (all_of_it, part) in sizes if all_of_it != part), None)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Move, back: Move) -> Tensor:  # noqa: ANN401
        ctx.back = back
        return there(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return ctx.back(grad), None, None


def _move(x: Tensor, there: Move, back: Move) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return there(x)
    moved: Tensor = _Moved.apply(x, there, back)  # type: ignore[no-untyped-call]
    return moved


def _same(x: Tensor) -> Tensor:
    return x
