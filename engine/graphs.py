"""Steps as graphs: a device plays back what was recorded once, over buffers that never move.

A step of R rows goes to the smallest recording with at least R rows and tables as wide as it needs. What it brings is
laid into one buffer of int32 on the host, which a single copy takes to the device, and the recording is played:

    tokens (r) | positions (r) | slots (r) | past_length (r) | present_length (r) | block_table (r, width)

Rows that a recording has too many have no past and no present; their keys and values go to the null block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.attention.base import AttentionInputs
from engine.attention.view import PagedView
from engine.batch import Array

ALIGNED = 4  # of a buffer's parts, in numbers: what they hold is then read by 16 bytes
CELLS = 1 << 19  # of the largest table, rows * width; a step that needs a larger one is not played back
NARROWEST = 16  # blocks of the narrowest tables: there is nothing to gain from narrower ones


@dataclass(frozen=True, slots=True)
class Computed:
    """What a pass made: hidden states (T, H), the view that they were computed over, and, where the pass has been that
    far, float32 logits (T, V) of them."""

    hidden: Tensor
    view: PagedView
    logits: Tensor | None = None

    def first(self, rows: int) -> "Computed":
        return Computed(self.hidden[:rows], self.view, None if self.logits is None else self.logits[:rows])


class GraphDevice(Protocol):
    """What recording needs of a device."""

    def host_buffer(self, size: int) -> Tensor:
        """int32 (size,) zeros on the host, which the device can copy from by itself."""
        ...

    def buffer(self, size: int) -> Tensor:
        """int32 (size,) zeros on the device."""
        ...

    def upload(self, source: Tensor, target: Tensor) -> None:
        """Starts a copy from a host buffer. What runs on the device later sees it."""
        ...

    def uploaded(self) -> None:
        """Waits until the last upload has read its source."""
        ...

    def record(self, run: Callable[[], Computed]) -> tuple[Callable[[], None], Computed]:
        """What does again on the device all that `run` does there, and the tensors that then hold what it made."""
        ...


class CudaGraphs:
    """Over torch's CUDA graphs, on the current device. All recordings share one pool of memory: one is played at a
    time, and what it made is read before the next. They share a stream, too: the libraries keep a workspace of tens of
    MiB for each that they have worked on."""

    def __init__(self) -> None:
        self._memory: Any = None
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def host_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=True)

    def buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device="cuda")

    def upload(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)
        self._read.record()

    def uploaded(self) -> None:
        self._read.synchronize()

    def record(self, run: Callable[[], Computed]) -> tuple[Callable[[], None], Computed]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # kernels are compiled and libraries choose theirs, which no recording can do
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Only of this thread: a model that is served already may work on another one meanwhile.
        with torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
            made = run()
        self._memory = self._memory or graph.pool()
        return graph.replay, made


def row_buckets(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    buckets = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*buckets, most]


def width_buckets(most: int) -> list[int]:
    """A quarter each of the next one, up to `most`, none but that narrower than NARROWEST."""
    buckets = [most]
    while -(-buckets[0] // 4) >= NARROWEST:
        buckets.insert(0, -(-buckets[0] // 4))
    return buckets


class StepGraphs:
    """`forward`: token ids (R,) and their attention to what the pass makes; it may not wait for the device.

    Recordings are made at once, the largest first, so that the others fit into its memory; `progress` is told."""

    def __init__(
        self,
        device: GraphDevice,
        forward: Callable[[Tensor, AttentionInputs], Computed],
        max_rows: int,
        max_width: int,
        progress: Callable[[str], None],
    ) -> None:
        self._device = device
        self._forward = forward
        pairs = [(r, w) for r in row_buckets(max_rows) for w in width_buckets(max_width) if r * w <= CELLS]
        self._buckets = sorted(pairs)
        size = max(_size(*pair) for pair in pairs)
        self._host, self._buffer = device.host_buffer(size), device.buffer(size)
        self._query_start = device.buffer(max_rows + 1)
        self._query_start.copy_(torch.arange(max_rows + 1, dtype=torch.int32))
        self._most = max_rows
        self._made: dict[tuple[str, int], Tensor] = {}  # (max_rows, width) by name and width
        self._recorded: dict[tuple[int, int], tuple[Callable[[], None], Computed]] = {}
        for done, pair in enumerate(sorted(pairs, key=lambda pair: -_size(*pair)), 1):
            self._recorded[pair] = device.record(lambda pair=pair: self._run(*pair))  # type: ignore[misc]
            progress(f"recording steps {done}/{len(pairs)}: {pair[0]} rows, {pair[1]} blocks each")

    def bucket(self, rows: int, width: int) -> tuple[int, int] | None:
        """(rows, width) of the recording that such a step goes to, or None."""
        return next((pair for pair in self._buckets if pair[0] >= rows and pair[1] >= width), None)

    def recording(self, rows: int, width: int) -> Callable[[], None]:
        """What plays back the recording that such a step goes to. Raises KeyError where there is none."""
        return self._recorded[self.bucket(rows, width) or (rows, width)][0]

    def play(self, tokens: Array, attention: Mapping[str, Array]) -> Computed | None:
        """`attention`: fields of AttentionInputs of rows that bring one query and one key each. None: no recording is
        large enough. What it gives is overwritten by the next call."""
        rows, width = attention["block_table"].shape
        pair = self.bucket(rows, width)
        if pair is None:
            return None
        used = _size(*pair)
        self._device.uploaded()
        _fill(self._host[:used].numpy(), pair, tokens, attention)
        self._device.upload(self._host[:used], self._buffer[:used])
        play, made = self._recorded[pair]
        play()
        return made.first(rows)

    def _run(self, rows: int, width: int) -> Computed:
        part = _aligned(rows)
        tokens, positions, slots, past, present = self._buffer[: 5 * part].view(5, part)[:, :rows]
        inputs = AttentionInputs(
            query_start=self._query_start[: rows + 1],
            past_length=past,
            present_length=present,
            block_table=self._buffer[5 * part : 5 * part + rows * width].view(rows, width),
            positions=positions.long(),
            slots=slots.long(),
            causal=True,
            steps=True,
        )
        made = self._forward(tokens.long(), inputs)
        logits = None if made.logits is None else self._kept("logits", made.logits)
        return Computed(self._kept("hidden", made.hidden), made.view, logits)

    def _kept(self, name: str, made: Tensor) -> Tensor:
        """(R, width), in a buffer that all recordings share. What each makes would else have its own room for good, and
        the logits of a large vocabulary take half a MiB a row. The first run, which is not recorded yet, makes it."""
        key = name, made.shape[1]
        if key not in self._made:
            self._made[key] = made.new_empty(self._most, made.shape[1])
        return self._made[key][: len(made)].copy_(made)


def _aligned(rows: int) -> int:
    return -(-rows // ALIGNED) * ALIGNED


def _size(rows: int, width: int) -> int:
    return 5 * _aligned(rows) + rows * width


def _fill(host: Array, pair: tuple[int, int], tokens: Array, attention: Mapping[str, Array]) -> None:
    """Zeros are the null block, its first slot, position 0, and no past."""
    host[:] = 0
    rows, width = attention["block_table"].shape
    part = _aligned(pair[0])
    names = ("positions", "slots", "past_length", "present_length")
    for index, array in enumerate([tokens, *(attention[name] for name in names)]):
        host[index * part :][:rows] = array
    np.copyto(host[5 * part :].reshape(pair)[:rows, :width], attention["block_table"])
