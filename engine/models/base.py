"""What the runner asks of a model, whatever its kind, and what loading one takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from engine.attention.view import PagedView
from engine.batch import Row, RowResult
from engine.errors import InvalidInput
from engine.parallel import Parallel
from engine.specs import DTYPE_BYTES, ModelSpec

if TYPE_CHECKING:
    from engine.text import Tokenizer  # models run where no tokenizer is installed

Progress = Callable[[str], None]
QUANTIZE = ("none", "int8")


class Model(Protocol):
    spec: ModelSpec

    def forward(self, inputs: dict[str, Tensor], kv: PagedView) -> Tensor:
        """The inputs of all rows, packed: (T, ...) those that ask, (S, ...) those appended -> hidden states (T, H)."""
        ...

    def logits(self, hidden: Tensor, kv: PagedView) -> Tensor | None:
        """float32 (R, V) of hidden states (R, H); None from a model that has none."""
        ...

    def outputs(
        self, hidden: Tensor, rows: list[Row], starts: list[int], kv: PagedView, logits: Tensor | None = None
    ) -> list[RowResult]:
        """What each row asked for. Row i's hidden states are hidden[starts[i] : starts[i] + queries + replay].
        `logits`: of every hidden state, where the pass has made them; both may be overwritten by the next pass."""
        ...


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """`dtype` of the weights, "auto": float16 on a GPU, bfloat16 on the CPU (whose float16 products are slow).
    `device` "auto": the GPU if there is one. `kv_dtype` of the past. `cache_dir` keeps what is converted once.
    `quantize` of a decoder's linears on the CPU, "int8" or "none"; other kinds and embeddings stay as they are.
    `parallel`: this rank's place among those that share the model; None keeps it whole. `kernels`: the native ones are
    loaded, and linears are theirs."""

    cache_dir: Path
    dtype: str = "auto"
    kv_dtype: str = "float16"
    device: str = "auto"
    parallel: Parallel | None = None
    quantize: str = "none"
    kernels: bool = False

    def resolve(self) -> tuple[str, torch.dtype]:
        """(device, dtype of the weights). Raises InvalidInput."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise InvalidInput("device", f"must be auto, cpu or cuda, got {device!r}")
        if self.quantize not in QUANTIZE:
            raise InvalidInput("quantize", f"must be one of {', '.join(QUANTIZE)}, got {self.quantize!r}")
        if self.quantize != "none" and device != "cpu":
            raise InvalidInput("quantize", f"{self.quantize} is for the CPU, not for {device}: say none, or device cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise InvalidInput("device", "there is no GPU that torch can use; leave it at auto or say cpu")
        name = self.dtype if self.dtype != "auto" else "bfloat16" if device == "cpu" else "float16"
        for field, value in (("dtype", name), ("kv_dtype", self.kv_dtype)):
            if value not in DTYPE_BYTES:
                raise InvalidInput(field, f"must be one of {', '.join(DTYPE_BYTES)}, got {value!r}")
        dtype: torch.dtype = getattr(torch, name)
        return device, dtype


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """`end_ids` are the tokens with which the model ends a reply."""

    model: Model
    tokenizer: Tokenizer | None
    end_ids: frozenset[int] = frozenset()
