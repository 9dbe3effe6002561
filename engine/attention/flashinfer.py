"""FlashInfer for steps, where it is installed; our own kernels for everything else, and for rotation and writes.

It plans on the host for each batch, so its steps cannot be recorded.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.attention.base import AttentionInputs, Backend, Rotary, Scoring
from engine.attention.cuda import TritonBackend

HEAD_DIMS = (64, 128, 256)  # that it has kernels for
TENSOR_CORES = 4  # query heads a kv head from which its tensor cores are the faster way, as its documentation has it
WORKSPACE = 128 << 20  # bytes, as its documentation wants them; zeroed
MARGIN = 0.9  # another backend is chosen for a step's attention in at most this share of the first one's time


class FlashInferBackend(TritonBackend):
    """Raises TritonUnavailable. `library`: the module flashinfer, or whoever has its decode wrapper."""

    name = "flashinfer"
    recordable = False

    def __init__(self, library: Any, kernels: object | None = None) -> None:  # noqa: ANN401
        super().__init__(kernels=kernels)
        self._library = library
        self._wrapper: Any = None
        self._planned: AttentionInputs | None = None  # whom the wrapper's plan is for: layers of a pass share one

    def __repr__(self) -> str:
        return "<FlashInferBackend>"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_blocks: Tensor,
        v_blocks: Tensor,
        inputs: AttentionInputs,
        rotary: Rotary | None,
        scoring: Scoring,
    ) -> Tensor:
        if not _takes(q, k_blocks, inputs, scoring):
            return super().attend(q, k, v, k_blocks, v_blocks, inputs, rotary, scoring)
        q = self._rotate_and_write(q, k, v, k_blocks, v_blocks, inputs, rotary, k_blocks.dtype)
        if self._planned is not inputs:
            self._plan(q, k_blocks, inputs, scoring)
        out: Tensor = self._wrapper.run(q.contiguous(), (k_blocks.transpose(2, 3), v_blocks))
        return out.flatten(1)

    def _plan(self, q: Tensor, k_blocks: Tensor, inputs: AttentionInputs, scoring: Scoring) -> None:
        if self._wrapper is None:
            workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device)
            together = q.shape[1] >= TENSOR_CORES * k_blocks.shape[1]
            wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper
            self._wrapper = wrapper(workspace, "HND", use_tensor_cores=together)
        kv_heads, head_dim, size = k_blocks.shape[1:]
        used = (inputs.present_length + (size - 1)) // size
        starts = torch.zeros(len(used) + 1, dtype=torch.int32, device=q.device)
        torch.cumsum(used, 0, dtype=torch.int32, out=starts[1:])
        columns = torch.arange(inputs.block_table.shape[1], device=q.device)
        self._wrapper.plan(
            starts,
            inputs.block_table[columns < used[:, None]],
            (inputs.present_length - 1) % size + 1,
            q.shape[1],
            kv_heads,
            head_dim,
            size,
            q_data_type=q.dtype,
            kv_data_type=k_blocks.dtype,
            sm_scale=scoring.scale,
        )
        self._planned = inputs


def installed() -> Any:  # noqa: ANN401
    """The module flashinfer, or None."""
    return importlib.import_module("flashinfer") if importlib.util.find_spec("flashinfer") else None


def fastest(backends: Sequence[Backend], seconds: Callable[[Backend], float], warn: Callable[[str], None]) -> Backend:
    """The first, unless another is clearly faster. One that fails here is told of and not chosen."""
    chosen, least = backends[0], seconds(backends[0])
    for backend in backends[1:]:
        try:
            took = seconds(backend)
        except Exception as error:  # it compiles at its first use, and may lack what that needs
            warn(f"the attention backend {backend.name} is installed and does not work here: {error}")
            continue
        if took < MARGIN * least:
            chosen, least = backend, took
    return chosen


def _takes(q: Tensor, k_blocks: Tensor, inputs: AttentionInputs, scoring: Scoring) -> bool:
    """Steps in 16 bits over keys that lie as values do, without masks or keys of the layer's own."""
    plain = inputs.bias is None and scoring.extra_k is None and not scoring.dropout
    half = q.dtype == k_blocks.dtype and q.dtype in (torch.float16, torch.bfloat16)
    return (
        inputs.steps
        and inputs.causal
        and plain
        and half
        and k_blocks.stride(2) == 1
        and q.shape[2] in HEAD_DIMS
        and len(q) > 0
        and (scoring.softmax_dtype == torch.float32)
    )
