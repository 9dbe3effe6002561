"""Owns the device: a batch becomes tensors, one forward pass, results. Decides nothing."""

import numpy as np
import torch
from torch import Tensor

from engine.attention.base import AttentionInputs, Backend
from engine.attention.mask import ragged_bias
from engine.attention.view import PagedView
from engine.batch import Batch, Row, RowResult
from engine.blocks import NULL_BLOCK
from engine.kv_pool import KVPool
from engine.models.base import Model
from engine.specs import ModelSpec


class ModelRunner:
    """`blocks` counts the null block."""

    def __init__(self, model: Model, backend: Backend, blocks: int, block_size: int) -> None:
        self.model = model
        self.backend = backend
        self.blocks = blocks
        self.spec: ModelSpec = model.spec
        self._block_size = block_size
        self._pool = KVPool(model.spec.kv, blocks, block_size, model.spec.device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[RowResult]:
        self._pool.copy(batch.copies)
        computed = [row for row in batch.rows if row.count or row.replay]
        starts = self._starts(batch.rows)
        weights: list[list[Tensor]] | None = [] if any(row.work.want.need_weights for row in batch.rows) else None
        view = PagedView(self._pool, self._prepare(computed), self.backend, weights)
        if not computed:  # peeks that have their tails
            return self.model.outputs(torch.empty(0), batch.rows, starts, view)
        hidden = self.model.forward(self._inputs(computed), view)
        return self.model.outputs(hidden, batch.rows, starts, view)

    def _prepare(self, rows: list[Row]) -> AttentionInputs:
        """A replayed position stands at stop - 1, sees what is there, and writes its K and V to the null block."""
        replays = [int(row.replay) for row in rows]
        past = [row.start - replay for row, replay in zip(rows, replays, strict=True)]
        counts = [row.count + replay for row, replay in zip(rows, replays, strict=True)]
        present = [start + count for start, count in zip(past, counts, strict=True)]
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        tables = np.full((len(rows), max((len(row.table) for row in rows), default=0)), NULL_BLOCK, dtype=np.int32)
        positions = np.empty(query_start[-1], dtype=np.int64)
        slots = np.empty(query_start[-1], dtype=np.int64)
        for index, row in enumerate(rows):
            own = slice(query_start[index], query_start[index + 1])
            tables[index, : len(row.table)] = row.table
            positions[own] = np.arange(past[index], present[index])
            blocks = tables[index, positions[own] // self._block_size] if not row.replay else NULL_BLOCK
            slots[own] = blocks * self._block_size + positions[own] % self._block_size
        biases = ragged_bias([_mask(row) for row in rows], counts, present)
        bias, bias_start = (None, None) if biases is None else map(self._to_device, biases)
        return AttentionInputs(
            query_start=self._tensor(query_start),
            past_length=self._tensor(np.array(past, dtype=np.int32)),
            present_length=self._tensor(np.array(present, dtype=np.int32)),
            block_table=self._tensor(tables),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            causal=self.spec.causal,
            bias=bias,
            bias_start=bias_start,
        )

    def _inputs(self, rows: list[Row]) -> dict[str, Tensor]:
        """The model's inputs of all rows, packed: (T, ...) each. The mask is not one of them: the attention has it."""
        history = self.spec.history
        inputs = {}
        for tensor in self.spec.inputs:
            if not tensor.required:
                continue
            parts = [
                np.array(row.history[-1:], dtype=np.int64)
                if row.replay and row.history is not None and tensor.name == history
                else row.input(tensor.name)
                for row in rows
            ]
            inputs[tensor.name] = self._tensor(
                np.concatenate(parts) if len(parts) > 1 else np.ascontiguousarray(parts[0])
            )
        return inputs

    def _starts(self, rows: list[Row]) -> list[int]:
        """Where each row's positions begin in the packed axis."""
        starts, at = [], 0
        for row in rows:
            starts.append(at)
            at += row.count + int(row.replay)
        return starts

    def _tensor(self, array: np.ndarray) -> Tensor:
        return self._to_device(torch.from_numpy(array))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.spec.device)


def _mask(row: Row) -> np.ndarray | None:
    """The caller's mask for this row's positions, (count, T)."""
    return row.input("attention_mask") if "attention_mask" in row.work.inputs else None
