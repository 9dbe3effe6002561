"""The CPU backend: a thin face on the native kernels in `engine/kernels`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.attention.base import AttentionInputs, PackedBlocks, Rotary, Scoring
from engine.attention.sdpa import SdpaBackend
from engine.kernels.build import Loaded, load


class CpuBackend:
    """Native kernels. Raises KernelUnavailable where they can be neither found nor built."""

    name = "cpu"
    recordable = True

    def __init__(self, cache_dir: Path, compiler: str = "g++", progress: Callable[[str], None] | None = None) -> None:
        self.kernels: Loaded = load(cache_dir, compiler, progress)
        self._truth = SdpaBackend()  # for what the kernels do not do
        _register_fakes()
        ops = torch.ops.keypast
        # Bound once: looking an operator up costs more than a small call of it.
        self._attend: Callable[..., Any] = ops.attend.default
        self._rms_norm: Callable[..., Any] = ops.rms_norm.default
        self._add_rms_norm: Callable[..., Any] = ops.add_rms_norm.default
        self._silu_gate: Callable[..., Any] = ops.silu_gate.default
        self._finite: Callable[..., Any] = ops.finite.default
        self._decoder_blocks: Callable[..., Any] = ops.decoder_blocks.default

    def __repr__(self) -> str:
        return f"<CpuBackend {self.kernels.isa}>"

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
        if scoring.softmax_dtype != torch.float32 or scoring.dropout:
            return self._truth.attend(q, k, v, k_blocks, v_blocks, inputs, rotary, scoring)
        attended: Tensor = self._attend(
            q,
            k,
            v,
            k_blocks,
            v_blocks,
            inputs.query_start,
            inputs.past_length,
            inputs.present_length,
            inputs.block_table,
            inputs.positions,
            inputs.slots,
            inputs.causal,
            inputs.bias,
            inputs.bias_start,
            None if rotary is None else rotary.cos,
            None if rotary is None else rotary.sin,
            scoring.scale,
            scoring.extra_k,
            scoring.extra_v,
        )
        return attended

    def finite(self, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> tuple[bool, bool]:
        return self._finite(k_blocks, 3, slots), self._finite(v_blocks, 2, slots)

    def probabilities(
        self, q: Tensor, k_blocks: Tensor, inputs: AttentionInputs, rotary: Rotary | None, scoring: Scoring
    ) -> list[Tensor]:
        return self._truth.probabilities(q, k_blocks, inputs, rotary, scoring)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return self._rms_norm(x, weight, eps), x
        normed, summed = self._add_rms_norm(x, residual, weight, eps)
        return normed, summed

    def silu_gate(self, x: Tensor) -> Tensor:
        gated: Tensor = self._silu_gate(x)
        return gated

    def decoder_blocks(
        self, x: Tensor, blocks: PackedBlocks, k: Tensor, v: Tensor, inputs: AttentionInputs, rotary: Rotary | None
    ) -> Tensor | None:
        hidden: Tensor = self._decoder_blocks(
            x,
            blocks.weights,
            k,
            v,
            inputs.query_start,
            inputs.past_length,
            inputs.present_length,
            inputs.block_table,
            inputs.positions,
            inputs.slots,
            None if rotary is None else rotary.cos,
            None if rotary is None else rotary.sin,
            blocks.heads,
            blocks.scale,
            blocks.eps,
        )
        return hidden


_fakes_registered = False


def _register_fakes() -> None:
    """Shapes without values, so that torch.compile can trace through the operators. Once per process."""
    global _fakes_registered
    if _fakes_registered:
        return
    _fakes_registered = True
    fake = torch.library.register_fake
    fake("keypast::attend", lambda q, *rest: q.new_empty(q.shape[0], q.shape[1] * q.shape[2]))
    fake("keypast::rms_norm", lambda x, weight, eps: x.new_empty(x.shape))
    fake("keypast::add_rms_norm", lambda x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape)))
    fake("keypast::decoder_blocks", lambda x, *rest: x.new_empty(x.shape))
    fake(
        "keypast::linear",
        lambda x, weight, bias, out_dtype=None: x.new_empty(*x.shape[:-1], bias.shape[0], dtype=out_dtype or x.dtype),
    )
    fake("keypast::silu_gate", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
