"""From the host to a device that works meanwhile: a copy that the host waits for would wait for all work before it."""

from collections.abc import Sequence

import torch
from torch import Tensor

STAGED = 1 << 20  # bytes; memory that is pinned for larger ones would stay so for good


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on the host, as the device's work that is queued from now on sees it; on the CPU itself, the same one.

    What is staged is the allocator's until the device has read it, so the host may let go of it at once."""
    if torch.device(device).type == "cpu":
        return tensor
    if tensor.nbytes > STAGED:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def lines(tensor: Tensor, chosen: Sequence[int]) -> Tensor:
    """Those of a tensor's lines, in order; the tensor itself where they are all of its lines."""
    if list(chosen) == list(range(len(tensor))):
        return tensor
    return tensor.index_select(0, to_device(torch.tensor(chosen, dtype=torch.int64), tensor.device))
