"""Owns the device: a batch becomes a plan, one forward pass, results. Decides nothing."""

import contextlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.attention.base import AttentionInputs, Backend
from engine.attention.mask import ragged_bias
from engine.attention.view import PagedView
from engine.batch import Array, Batch, Row, RowResult, Sample
from engine.blocks import NULL_BLOCK, blocks_for
from engine.errors import DeviceFull, DeviceLost
from engine.graphs import Computed, GraphDevice, StepGraphs
from engine.kv_pool import KVPool
from engine.models.base import Model
from engine.parallel import Parallel
from engine.sampling import draw_together
from engine.specs import ModelSpec, TensorSpec
from engine.upload import to_device


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward pass as plain arrays: all that a process must know that holds a share of the model and of its pool.

    `attention`: fields of AttentionInputs by name. `inputs`: the model's, packed: (T, ...) for those that ask, (S, ...)
    for those that are appended. When every row is a peek that has its tail there is neither, and no forward pass.
    `steps`: each row has exactly one query.
    """

    copies: list[tuple[int, int]]
    attention: dict[str, Array]
    inputs: dict[str, Array]
    need_weights: bool
    steps: bool

    @property
    def is_step(self) -> bool:
        """Each row has one query, and a key to write, no mask, and nobody asks for probabilities."""
        one_key = len(self.attention["slots"]) == len(self.attention["past_length"]) > 0
        return one_key and self.steps and "bias" not in self.attention and not self.need_weights

    @property
    def is_empty(self) -> bool:
        return not len(self.attention["positions"]) and not len(self.attention["slots"])


class Together(Protocol):
    """How the ranks that hold the model's other shares are made to do what this one does (see engine.team)."""

    def __call__(self, method: str, *arguments: object) -> AbstractContextManager[list[Any]]: ...


class ModelRunner:
    """`blocks` counts the null block. With `parallel` the model is cut and the pool holds this rank's heads; `together`
    is for the rank that runs batches, the others are given plans. `synchronize` raises where the device is lost."""

    def __init__(
        self,
        model: Model,
        backend: Backend,
        blocks: int,
        block_size: int,
        parallel: Parallel | None = None,
        together: Together | None = None,
        synchronize: Callable[[], object] | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self.blocks = blocks
        self.spec: ModelSpec = model.spec
        self._block_size = block_size
        self._ranks = None if parallel is None else parallel.model
        self._together = together or _alone
        self._synchronize = synchronize or _synchronize
        kv = self.spec.kv
        if self._ranks is not None:
            kv = replace(kv, kv_heads=kv.kv_heads // self._ranks.size)
        self._pool = KVPool(kv, blocks, block_size, model.spec.device)
        self._graphs: StepGraphs | None = None

    def run(self, batch: Batch) -> list[RowResult]:
        """Raises DeviceFull, DeviceLost, and what else a model may raise."""
        with contextlib.suppress(torch.OutOfMemoryError), torch.inference_mode(), self._answering():
            plan = self.plan(batch)
            with self._together("execute", plan):
                computed = self._execute(plan)
            return self._outputs(batch, computed)
        raise _full()  # out here, with no trace of that error, which would hold what the pass had made

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Raises DeviceLost where the body failed and so would any other from now on."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            try:
                self._synchronize()
            except RuntimeError:
                raise DeviceLost(f"the device does not answer any more: {error}") from error
            raise

    def plan(self, batch: Batch) -> Plan:
        computed = [row for row in batch.rows if row.count or row.queries or row.replay]
        need_weights = any(row.work.want.need_weights for row in batch.rows)
        steps = all(row.queries + row.replay == 1 for row in computed)
        attention = self._steps(computed) if steps and _are_plain(computed) else self._attention(computed)
        return Plan(batch.copies, attention, self._inputs(computed), need_weights, steps)

    @torch.inference_mode()
    def rehearse(self, rows: int, each: int) -> None:
        """A pass of so many rows of `each` new positions over the widest tables, and a draw of each row's next token:
        for what it takes of the device. Only the null block is written."""
        width = blocks_for(self.spec.max_length, self._block_size)
        attention: dict[str, Array] = {
            "query_start": np.arange(rows + 1, dtype=np.int32) * np.int32(each),
            "past_length": np.zeros(rows, dtype=np.int32),
            "present_length": np.full(rows, each, dtype=np.int32),
            "block_table": np.full((rows, width), NULL_BLOCK, dtype=np.int32),
            "positions": np.tile(np.arange(each), rows),
            "slots": np.full(rows * each, NULL_BLOCK * self._block_size),
        }
        asked = [tensor for tensor in self.spec.inputs if tensor.required]
        shapes = {tensor.name: (rows * each, *map(int, tensor.trailing)) for tensor in asked}
        inputs = {tensor.name: np.zeros(shapes[tensor.name], tensor.dtypes[0]) for tensor in asked}
        made = self.execute(Plan([], attention, inputs, need_weights=False, steps=each == 1))
        logits = self.model.logits(made.hidden[:rows], made.view)
        if logits is not None:  # drawn from beside those that recorded steps keep
            sample = Sample(temperature=1.0, top_p=0.9)
            draw_together(logits.clone(), [sample] * rows, [None] * rows, [(0, 0)] * rows)

    @torch.inference_mode()
    def record_steps(self, device: GraphDevice, max_rows: int, progress: Callable[[str], None]) -> None:
        """Steps of up to so many rows are played back from now on; of a model that takes a token a row and is whole."""
        if self.spec.history is None or self._ranks is not None:
            return
        width = min(blocks_for(self.spec.max_length, self._block_size), self.blocks - 1)
        self._graphs = StepGraphs(device, self._step, min(max_rows, self.blocks - 1), width, progress)

    def replay_of(self, plan: Plan) -> Callable[[], None]:
        """What plays back the recording that such a step goes to, over what its buffers hold: to be timed alone."""
        assert self._graphs is not None
        return self._graphs.recording(*plan.attention["block_table"].shape)

    def _step(self, tokens: Tensor, inputs: AttentionInputs) -> Computed:
        assert self.spec.history is not None
        view = PagedView(self._pool, inputs, self.backend)
        hidden = self.model.forward({self.spec.history: tokens}, view)
        return Computed(hidden, view, self.model.logits(hidden, view))

    @torch.inference_mode()
    def execute(self, plan: Plan) -> Computed:
        """The blocks' copies and the forward pass."""
        return self._execute(plan)

    def _execute(self, plan: Plan) -> Computed:
        self._pool.copy(plan.copies)
        if self._graphs is not None and self.spec.history is not None and plan.is_step:
            played = self._graphs.play(plan.inputs[self.spec.history], plan.attention)
            if played is not None:
                return played
        attention: dict[str, Any] = {name: self._tensor(array) for name, array in plan.attention.items()}
        inputs = AttentionInputs(causal=self.spec.causal, steps=plan.steps, **attention)
        view = PagedView(self._pool, inputs, self.backend, [] if plan.need_weights else None)
        if plan.is_empty:
            return Computed(torch.empty(0), view)
        hidden = self.model.forward({name: self._tensor(array) for name, array in plan.inputs.items()}, view)
        if self._ranks is not None and view.weights is not None:
            view.weights = [[self._ranks.gather(row, 0) for row in rows] for rows in view.weights]
        return Computed(hidden, view)

    def _outputs(self, batch: Batch, made: Computed) -> list[RowResult]:
        """A result a row, in order."""
        return self.model.outputs(made.hidden, batch.rows, self._starts(batch.rows), made.view, made.logits)

    def read_past(self, tables: list[list[int]], lengths: list[int]) -> dict[str, Array]:
        """Keys and values as `ModelSpec.past_tensors` has them; T is the longest length. Raises DeviceFull."""
        with contextlib.suppress(torch.OutOfMemoryError):
            with self._together("read_past", tables, lengths) as shares:
                own = self._read_past(tables, lengths)
            if not shares:
                return own
            return {name: np.concatenate([array, *(share[name] for share in shares)], 1) for name, array in own.items()}
        raise _full()

    def write_past(self, tables: list[list[int]], lengths: list[int], arrays: dict[str, Array]) -> None:
        """The inverse of `read_past`; more slots than the longest length are ignored. Raises DeviceFull."""
        with contextlib.suppress(torch.OutOfMemoryError):
            with self._together("write_past", tables, lengths, arrays):
                self._write_past(tables, lengths, arrays)
            return
        raise _full()

    @torch.inference_mode()
    def zero(self, blocks: list[int]) -> None:
        """Nothing of what was written to them is left."""
        with self._together("zero", blocks):
            self._pool.zero(blocks)

    @torch.inference_mode()
    def _read_past(self, tables: list[list[int]], lengths: list[int]) -> dict[str, Array]:
        """This rank's heads of it."""
        table, valid = self._past_blocks(tables, lengths)
        past = {}
        for layer in range(self.spec.kv.layers):
            key, value = self._pool.read(layer, table, valid)
            past[f"key_past.{layer}"], past[f"value_past.{layer}"] = _to_numpy(key), _to_numpy(value)
        return past

    @torch.inference_mode()
    def _write_past(self, tables: list[list[int]], lengths: list[int], arrays: dict[str, Array]) -> None:
        table, valid = self._past_blocks(tables, lengths)
        slots, heads = valid.shape[1], self._own_heads
        for layer in range(self.spec.kv.layers):
            key = self._tensor(arrays[f"key_past.{layer}"][:, heads, :, :slots])
            value = self._tensor(arrays[f"value_past.{layer}"][:, heads, :slots])
            self._pool.write(layer, table, valid, key, value)

    @property
    def _own_heads(self) -> slice:
        first = 0 if self._ranks is None else self._ranks.rank * self._pool.kv_heads
        return slice(first, first + self._pool.kv_heads)

    def _past_blocks(self, tables: list[list[int]], lengths: list[int]) -> tuple[Tensor, Tensor]:
        """What covers the lengths, (R, W) padded with the null block, and which slots are valid, bool (R, T)."""
        width = blocks_for(max(lengths), self._block_size)
        table = np.full((len(tables), width), NULL_BLOCK, dtype=np.int64)
        for own, blocks, length in zip(table, tables, lengths, strict=True):
            used = blocks_for(length, self._block_size)
            own[:used] = blocks[:used]
        valid = np.arange(max(lengths)) < np.array(lengths)[:, None]
        return self._tensor(table), self._tensor(valid)

    def _steps(self, rows: list[Row]) -> dict[str, Array]:
        """What `_attention` gives for plain rows, at few calls of numpy: the pass before filled the caches with weights
        and each of them costs several microseconds."""
        size, lines = self._block_size, [row.table for row in rows]
        start = array("i", [row.start for row in rows])
        slots = array("q", [line[at // size] * size + at % size for line, at in zip(lines, start, strict=True)])
        if len(rows) == 1:
            tables = np.frombuffer(lines[0], dtype=np.int32)[np.newaxis]
        else:
            tables = np.full((len(rows), max(map(len, lines))), NULL_BLOCK, dtype=np.int32)
            for own, line in zip(tables, lines, strict=True):
                own[: len(line)] = line
        return {
            "query_start": np.frombuffer(array("i", range(len(rows) + 1)), dtype=np.int32),
            "past_length": np.frombuffer(start, dtype=np.int32),
            "present_length": np.frombuffer(array("i", [row.stop for row in rows]), dtype=np.int32),
            "block_table": tables,
            "positions": np.frombuffer(array("q", start), dtype=np.int64),
            "slots": np.frombuffer(slots, dtype=np.int64),
        }

    def _attention(self, rows: list[Row]) -> dict[str, Array]:
        """A replayed position stands at start - 1 and sees what is there. Its K and V go to the null block, and so do
        those of padding, which a model whose queries stand at the positions appended brings for each of them."""
        past = [row.start - int(row.replay) for row in rows]
        present = [row.stop for row in rows]
        queries = [row.queries + int(row.replay) for row in rows]
        keys = queries if self.spec.aligned else [row.count for row in rows]
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(queries, out=query_start[1:])
        tables = np.full((len(rows), max((len(row.table) for row in rows), default=0)), NULL_BLOCK, dtype=np.int32)
        positions = np.empty(query_start[-1], dtype=np.int64)
        slots = np.full(sum(keys), NULL_BLOCK * self._block_size, dtype=np.int64)
        at = 0
        for index, row in enumerate(rows):
            tables[index, : len(row.table)] = row.table
            positions[query_start[index] : query_start[index + 1]] = np.arange(
                past[index], past[index] + queries[index]
            )
            new = np.arange(row.start, row.stop)
            blocks = tables[index, new // self._block_size]
            first = at + int(row.replay)
            slots[first : first + row.count] = blocks * self._block_size + new % self._block_size
            at += keys[index]
        np.minimum(positions, self.spec.max_length - 1, out=positions)  # padding may reach beyond, tables do not
        inputs: dict[str, Array] = {
            "query_start": query_start,
            "past_length": np.array(past, dtype=np.int32),
            "present_length": np.array(present, dtype=np.int32),
            "block_table": tables,
            "positions": positions,
            "slots": slots,
        }
        biases = ragged_bias([_mask(row) for row in rows], queries, present)
        return inputs if biases is None else {**inputs, "bias": biases[0], "bias_start": biases[1]}

    def _inputs(self, rows: list[Row]) -> dict[str, Array]:
        """The model's inputs of all rows, packed. The mask is not one of them: the attention has it."""
        inputs: dict[str, Array] = {}
        for tensor in self.spec.inputs:
            if not tensor.required:
                continue
            parts = [part for row in rows if (part := self._input(row, tensor)) is not None]
            if not parts:  # no row brings any
                inputs[tensor.name] = np.zeros((0, *map(int, tensor.trailing)), dtype=tensor.dtypes[0])
            else:
                inputs[tensor.name] = np.concatenate(parts) if len(parts) > 1 else np.ascontiguousarray(parts[0])
        return inputs

    def _input(self, row: Row, tensor: TensorSpec) -> Array | None:
        """This row's part of an input, or None: it brings nothing on that axis."""
        parts = []
        if row.replay and row.history is not None and tensor.name == self.spec.history:
            parts.append(np.array(row.history[-1:], dtype=np.int64))
        if tensor.name in row.work.inputs:
            asks = tensor.axis == "n" or self.spec.aligned
            parts.append(row.asked(tensor.name) if asks else row.appended(tensor.name))
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _starts(self, rows: list[Row]) -> list[int]:
        """Where each row's queries begin in the packed axis."""
        starts, at = [], 0
        for row in rows:
            starts.append(at)
            at += row.queries + int(row.replay)
        return starts

    def _tensor(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        return to_device(tensor, self.spec.device)


def _synchronize() -> None:
    """Raises RuntimeError where a kernel has failed: each call does from then on."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _full() -> DeviceFull:
    """What the failed pass has left in torch's cache, cut to its own sizes, goes back to the device."""
    torch.cuda.empty_cache()
    return DeviceFull()


def _are_plain(rows: list[Row]) -> bool:
    """Each appends one position, which asks, under no mask of its own."""
    return bool(rows) and all(row.count == row.queries == 1 and _mask(row) is None for row in rows)


def _mask(row: Row) -> Array | None:
    """The caller's mask for this row's queries, (queries, T)."""
    return row.asked("attention_mask") if "attention_mask" in row.work.inputs else None


def _to_numpy(tensor: Tensor) -> Array:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def _alone(method: str, *arguments: object) -> AbstractContextManager[list[Any]]:
    return nullcontext([])
