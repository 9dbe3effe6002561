"""Stand-ins that are passed to constructors: a clock that is told the time, a runner that keeps its past in a dict."""

from collections import defaultdict

import numpy as np

from engine.batch import Batch, Row, RowResult
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
        *(TensorSpec(name, ("float16", "float32"), (4,)) for name in ("query", "key", "value")),
        TensorSpec("attention_mask", ("float32", "bool"), ("T",), required=False, values=(0, 1)),
    ),
    outputs=(TensorSpec("attn_out", ("float32",), (4,)),),
    kv=KVSpec(layers=1, kv_heads=1, head_dim=4),
    causal=False,
    max_length=200,
    dtype="float32",
    device="cpu",
    fingerprint="fake",
)


class FakeClock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """A model that reads its whole past through the block table: what it gives depends on what the blocks really hold.

    It keeps ids by (block, offset) as a device would, applies copies, and notes in `faults` when a past that it reads
    is not the history that it is told. The next token is a hash of the whole past. A batch that appends `poison` fails.
    """

    def __init__(self, spec: ModelSpec = DECODER, blocks: int = 20, block_size: int = 16) -> None:
        self.spec = spec
        self.blocks = blocks
        self.block_size = block_size
        self.poison: int | None = None
        self.batches: list[list[tuple[str, int, int, int]]] = []  # (session, row, start, stop) of each row
        self.faults: list[str] = []
        self._memory: dict[tuple[int, int], int] = defaultdict(int)

    def run(self, batch: Batch) -> list[RowResult]:
        self.batches.append([(row.work.session.id, row.index, row.start, row.stop) for row in batch.rows])
        for source, target in batch.copies:
            for offset in range(self.block_size):
                self._memory[target, offset] = self._memory[source, offset]
        for row in batch.rows:
            for position, value in zip(range(row.start, row.stop), self._values(row), strict=True):
                self._memory[self._place(row, position)] = value
        if any(self.poison in self._values(row) for row in batch.rows):
            raise RuntimeError("poisoned")
        return [self._result(row) for row in batch.rows]

    def _values(self, row: Row) -> list[int]:
        name = self.spec.inputs[0].name
        chunk: np.ndarray = row.input(name) if name in row.work.inputs else np.zeros((0,), np.int64)
        return [int(value) for value in chunk.reshape(len(chunk), -1)[:, 0]] if len(chunk) else []

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        return row.table[position // self.block_size], position % self.block_size

    def _result(self, row: Row) -> RowResult:
        past = [self._memory[self._place(row, position)] for position in range(row.stop)]
        if row.history is not None:
            new = row.work.inputs.get(self.spec.history or "")
            told = list(row.history)
            if new is not None:
                told += new[row.index, : row.stop - row.work.past_length[row.index]].tolist()
            if past != told:
                self.faults.append(f"{row.work.session!r} row {row.index} reads {past}, should be {told}")
        result = RowResult(tail=("tail", tuple(past)) if row.last else None)
        if self.spec.kind == "attention":
            running = np.cumsum(past)[row.start : row.stop].astype(np.float32)
            result.positions["attn_out"] = np.repeat(running[:, None], 4, axis=1)
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
