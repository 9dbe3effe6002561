"""Stand-ins that are passed to constructors: a clock that is told the time, quotas that cannot be looked up, a runner
that keeps its past in a dict."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from engine.batch import Array, Batch, Row, RowResult
from engine.config import Quota
from engine.specs import KVSpec, ModelSpec, TensorSpec

VOCAB = 97

DECODER = ModelSpec(
    name="decoder",
    kind="decoder",
    inputs=(TensorSpec("token_ids", ("int64",), values=(0, VOCAB - 1)),),
    outputs=(TensorSpec("logits", ("float32",), (VOCAB,)), TensorSpec("next_token", ("int64",))),
    kv=KVSpec(layers=1, kv_heads=1, head_dim=8),
    causal=True,
    max_length=200,
    dtype="float32",
    device="cpu",
    fingerprint="fake",
    history="token_ids",
    vocab_size=VOCAB,
)

ATTENTION = ModelSpec(
    name="attention",
    kind="attention",
    inputs=(
        TensorSpec("query", ("float16", "float32"), (4,)),
        TensorSpec("key", ("float16", "float32"), (4,), axis="m"),
        TensorSpec("value", ("float16", "float32"), (4,), axis="m"),
        TensorSpec("attention_mask", ("float32", "bool"), ("T",), required=False, values=(0, 1)),
    ),
    outputs=(TensorSpec("attn_out", ("float32",), (4,)),),
    kv=KVSpec(layers=1, kv_heads=1, head_dim=4),
    causal=False,
    max_length=200,
    dtype="float32",
    device="cpu",
    fingerprint="fake",
    appends="m",
)


class FakeClock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FaultyQuotas(Mapping[str, Quota]):
    """No tenant has a quota of its own. `fail` the so-manieth look-up from now, of those on the worker's thread
    (`on_engine`) or on any other; `fired` says whether it came to that."""

    def __init__(self) -> None:
        self.fired = False
        self._left = 0
        self._on_engine = False

    def fail(self, lookup: int, *, on_engine: bool = False) -> None:
        self._left, self._on_engine, self.fired = lookup, on_engine, False

    def mend(self) -> None:
        self._left = 0

    @overload
    def get(self, key: str, /) -> Quota | None: ...
    @overload
    def get(self, key: str, default: Any, /) -> Any: ...
    def get(self, key: str, default: Any = None, /) -> Any:
        if self._left and self._on_engine == (threading.current_thread().name == "engine"):
            self._left -= 1
            if self._left == 0:
                self.fired = True
                raise MemoryError("no room to look it up")
        return default

    def __getitem__(self, key: str) -> Quota:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class FakeMemory:
    """One number a slot, as a device would keep it by (block, offset). In a past every key of a position is its number
    and every value minus that; what comes in any other way is noted in `faults`."""

    def __init__(self, spec: ModelSpec, block_size: int) -> None:
        self.spec = spec
        self.block_size = block_size
        self.faults: list[str] = []
        self._slots: dict[tuple[int, int], float] = defaultdict(float)

    def read(self, table: Sequence[int], positions: Iterable[int]) -> list[float]:
        return [self._slots[self._slot(table, position)] for position in positions]

    def write(self, table: Sequence[int], start: int, numbers: Iterable[float]) -> None:
        for position, number in enumerate(numbers, start):
            self._slots[self._slot(table, position)] = number

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        for source, target in pairs:
            for offset in range(self.block_size):
                self._slots[target, offset] = self._slots[source, offset]

    def zero(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            for offset in range(self.block_size):
                self._slots.pop((block, offset), None)

    def is_zero(self, block: int) -> bool:
        return not any(self._slots.get((block, offset)) for offset in range(self.block_size))

    def read_past(self, tables: list[list[int]], lengths: list[int]) -> dict[str, Array]:
        numbers = np.zeros((len(lengths), max(lengths)))
        for row, table, length in zip(numbers, tables, lengths, strict=True):
            row[:length] = self.read(table, range(length))
        past = {}
        for name, (dtype, shape) in self.spec.past_tensors(*numbers.shape).items():
            if name.startswith("key_past"):
                past[name] = np.broadcast_to(numbers[:, None, None, :], shape).astype(dtype)
            elif name.startswith("value_past"):
                past[name] = np.broadcast_to(-numbers[:, None, :, None], shape).astype(dtype)
        return past

    def write_past(self, tables: list[list[int]], lengths: list[int], arrays: dict[str, Array]) -> None:
        for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            key = arrays["key_past.0"][row, :, :, :length]
            value = arrays["value_past.0"][row, :, :length]
            if (key != key[0, 0]).any() or (value != -key[0, 0][:, None]).any():
                self.faults.append(f"row {row} is not as it was exported")
            self.write(table, 0, key[0, 0].tolist())

    def _slot(self, table: Sequence[int], position: int) -> tuple[int, int]:
        return table[position // self.block_size], position % self.block_size


class FakeRunner:
    """A model that reads its whole past through the block table: what it gives depends on what the blocks really hold.

    It keeps ids (or the first channel of values) by (block, offset) as a device would, applies copies, and notes in
    `faults` when a past that it reads is not the history that it is told. The next token is a hash of the whole past.
    An attention layer answers a query with its first channel and the sum of what it may see. A batch that appends
    `poison` fails, as does a transfer of a row of that length; `broken` is raised before anything is done.
    """

    def __init__(self, spec: ModelSpec = DECODER, blocks: int = 20, block_size: int = 16) -> None:
        self.spec = spec
        self.blocks = blocks
        self.memory = FakeMemory(spec, block_size)
        self.poison: int | None = None
        self.broken: Exception | None = None
        self.batches: list[list[tuple[str, int, int, int]]] = []  # (session, row, start, stop) of each row
        self.transfers: list[tuple[str, list[int]]] = []  # (which, lengths)
        self.before_run: Callable[[Batch], object] = bool
        self.on_transfer: Callable[[], object] = bool  # called first
        self.replayed = 0  # positions
        self.zeroed: list[list[int]] = []  # blocks of each call
        self.faults = self.memory.faults

    def run(self, batch: Batch) -> list[RowResult]:
        self.before_run(batch)
        if self.broken is not None:
            raise self.broken
        self.batches.append([(row.work.session.id, row.index, row.start, row.stop) for row in batch.rows])
        self.memory.copy(batch.copies)
        self.replayed += sum(row.replay for row in batch.rows)
        for row in batch.rows:
            self.memory.write(row.table, row.start, self._values(row))
        if any(self.poison in self._values(row) for row in batch.rows):
            raise RuntimeError("poisoned")
        return [self._result(row) for row in batch.rows]

    def read_past(self, tables: list[list[int]], lengths: list[int]) -> dict[str, Array]:
        self.transfers.append(("read", lengths))
        self.on_transfer()
        if self.poison in lengths:
            raise RuntimeError("poisoned")
        return self.memory.read_past(tables, lengths)

    def write_past(self, tables: list[list[int]], lengths: list[int], arrays: dict[str, Array]) -> None:
        self.transfers.append(("write", lengths))
        self.on_transfer()
        self.memory.write_past(tables, lengths, arrays)
        if self.poison in lengths:
            raise RuntimeError("poisoned")

    def zero(self, blocks: list[int]) -> None:
        self.zeroed.append(blocks)
        self.memory.zero(blocks)

    def _values(self, row: Row) -> list[int]:
        """What the row appends."""
        name = [tensor.name for tensor in self.spec.inputs if tensor.axis == self.spec.appends and tensor.required][-1]
        if name not in row.work.inputs:
            return []
        return [int(np.ravel(position)[0]) for position in row.appended(name)]

    def _result(self, row: Row) -> RowResult:
        past = [int(number) for number in self.memory.read(row.table, range(row.stop))]
        if self.spec.history is not None and row.history is not None:
            new = row.work.inputs.get(self.spec.history)
            told = list(row.history)
            if new is not None:
                told += new[row.index, : row.stop - row.work.past_length[row.index]].tolist()
            if past != told:
                self.faults.append(f"{row.work.session!r} row {row.index} reads {past}, should be {told}")
        if row.work.is_peek and row.tail is not None and row.tail != ("tail", tuple(past[: row.start])):
            self.faults.append(
                f"{row.work.session!r} row {row.index} has the tail {row.tail[1]} of {past[: row.start]}"
            )
        result = RowResult(tail=("tail", tuple(past)) if row.last else None)
        if self.spec.kind == "attention" and row.queries:
            seen = np.ones((row.queries, row.stop))
            if "attention_mask" in row.work.inputs:
                seen = row.asked("attention_mask")[:, : row.stop]
            answers = row.asked("query")[:, 0] + seen @ np.array(past, dtype=np.float32)
            result.positions["attn_out"] = np.repeat(answers[:, None].astype(np.float32), 4, axis=1)
        if row.last and row.work.want.sample is not None:
            result.once["next_token"] = next_token(past)
            if row.work.want.logprob:
                result.once["logprob"] = -0.5
        return result


def next_token(past: list[int]) -> int:
    value = 7
    for token in past:
        value = (value * 31 + token + 1) % 1_000_003
    return value % (VOCAB - 1)  # never the last id, which tests use as poison
