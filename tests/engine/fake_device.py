"""A device that is none, for steps that are recorded and played back: for pytest, and for `gpu_check --dry-run`."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.graphs import Computed


class FakeDevice:
    """Records by keeping the function; playing it back writes what it makes where the recording's results are."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.pending = False

    def host_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32)

    buffer = host_buffer

    def upload(self, source: Tensor, target: Tensor) -> None:
        assert not self.pending, "the host buffer is read yet"
        self.events.append(f"upload {len(source)}")
        target.copy_(source)
        self.pending = True

    def uploaded(self) -> None:
        self.pending = False

    def record(self, run: Callable[[], Computed]) -> tuple[Callable[[], None], Computed]:
        made = run()
        number = len([event for event in self.events if event.startswith("record")])
        self.events.append(f"record {len(made.hidden)}")

        def play() -> None:
            self.events.append(f"play {number}")
            again = run()
            assert again.hidden.data_ptr() == made.hidden.data_ptr()  # nothing has moved

        return play, made
