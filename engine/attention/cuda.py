"""The GPU backend: a thin face on the Triton kernels. Nothing it does waits for the device, but for probabilities."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.attention.base import AttentionInputs, PackedBlocks, Rotary, Scoring
from engine.attention.sdpa import SdpaBackend


class TritonUnavailable(Exception):
    """Triton is not installed, or cannot be used; the message says which."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels cut their work, whatever the batch.

    `split`: keys of one partial result, a multiple of `tile`, which is in keys, too. `lanes`: pairs of a query and a
    head in one program of a prefill, half as many under a mask. `warps` and `stages` of a step's programs and of a
    prefill's; heads too wide for the shared memory of a small GPU get fewer stages and lanes.
    """

    split: int = 512
    tile: int = 64
    lanes: int = 128
    warps: int = 4
    stages: int = 3
    prefill_warps: int = 8
    prefill_stages: int = 2
    wide: bool = False  # products in float32, whatever the past's dtype

    def __post_init__(self) -> None:
        if self.split % self.tile:
            raise ValueError(f"split must be a multiple of tile, got {self.split} and {self.tile}")


class TritonBackend:
    """Raises TritonUnavailable. Triton is imported here and nowhere earlier: only a GPU has a use for it.

    `kernels`: whoever has the kernels of engine.attention.triton_kernels, by name."""

    name = "triton"
    recordable = True

    def __init__(self, tuning: Tuning = Tuning(), kernels: object | None = None) -> None:
        if kernels is None:
            try:
                from engine.attention import triton_kernels as kernels
            except ImportError as reason:
                raise TritonUnavailable(f"triton cannot be imported: {reason}") from reason
        self.tuning = tuning
        self._kernels: Any = kernels
        self._truth = SdpaBackend()  # for what the kernels do not do

    def __repr__(self) -> str:
        return f"<TritonBackend split {self.tuning.split}, tile {self.tuning.tile}>"

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
        if not _supported(q, scoring) or scoring.dropout:
            return self._truth.attend(q, k, v, k_blocks, v_blocks, inputs, rotary, scoring)
        dot = self._product_dtype(q, k_blocks)
        q = self._rotate_and_write(q, k, v, k_blocks, v_blocks, inputs, rotary, dot)
        if inputs.steps:
            out = torch.empty(q.shape, dtype=v.dtype, device=v.device)
        else:
            out = torch.zeros(q.shape, dtype=v.dtype, device=v.device)  # positions of no row stay zeros
        if q.shape[0] and len(inputs.past_length):
            arguments = _Arguments(q, k_blocks, v_blocks, inputs, scoring, dot)
            self._decode(out, arguments)
            if not inputs.steps:
                self._prefill(out, arguments)
        return out.flatten(1)

    def finite(self, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> tuple[bool, bool]:
        return self._truth.finite(k_blocks, v_blocks, slots)

    def probabilities(
        self, q: Tensor, k_blocks: Tensor, inputs: AttentionInputs, rotary: Rotary | None, scoring: Scoring
    ) -> list[Tensor]:
        if not _supported(q, scoring):
            return self._truth.probabilities(q, k_blocks, inputs, rotary, scoring)
        dot = self._product_dtype(q, k_blocks)
        if rotary is not None:
            q = self._rotated(q, inputs, rotary, dot)
        extras = 0 if scoring.extra_k is None else scoring.extra_k.shape[0]
        counts, columns = inputs.query_start.diff().long(), inputs.present_length.long() + extras
        starts = torch.zeros(len(counts) + 1, dtype=torch.int64, device=q.device)
        torch.cumsum(q.shape[1] * counts * columns, 0, out=starts[1:])
        queries, widths, sizes = torch.stack([counts, columns, starts.diff()]).tolist()  # the host waits here, once
        out = torch.empty(sum(sizes), dtype=torch.float32, device=q.device)
        if len(out):
            self._probabilities(out, starts, _Arguments(q, k_blocks, k_blocks, inputs, scoring, dot))
        return [
            part.view(q.shape[1], count, width)
            for part, count, width in zip(torch.split(out, sizes), queries, widths, strict=True)
        ]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.dtype == torch.float64:
            return self._truth.rms_norm(x, weight, eps, residual)
        x, added = x.contiguous(), None if residual is None else residual.contiguous()
        size, normed = x.shape[-1], torch.empty_like(x)
        summed = x if added is None else torch.empty_like(x)
        if x.numel():
            self._kernels.rms_norm[(x.numel() // size,)](
                x,
                x if added is None else added,
                weight,
                normed,
                summed,
                eps,
                H=size,
                BLOCK_H=_power(size),
                HAS_RESIDUAL=added is not None,
                num_warps=8 if size >= 2048 else 4 if size >= 512 else 1,
            )
        return normed, summed

    def silu_gate(self, x: Tensor) -> Tensor:
        x, features = x.contiguous(), x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], features)
        if out.numel():
            block = min(1024, _power(features))
            grid = (out.numel() // features, -(-features // block))
            self._kernels.silu_gate[grid](x, out, F=features, BLOCK=block, num_warps=4)
        return out

    def decoder_blocks(
        self, x: Tensor, blocks: PackedBlocks, k: Tensor, v: Tensor, inputs: AttentionInputs, rotary: Rotary | None
    ) -> Tensor | None:
        return None

    def _product_dtype(self, q: Tensor, k_blocks: Tensor) -> torch.dtype:
        """In which queries meet keys, and weights values; sums are float32. 16-bit keys are used as they are stored."""
        wide = self.tuning.wide or torch.float32 in (q.dtype, k_blocks.dtype)
        return torch.float32 if wide else k_blocks.dtype

    def _rotate_and_write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_blocks: Tensor,
        v_blocks: Tensor,
        inputs: AttentionInputs,
        rotary: Rotary | None,
        dot: torch.dtype,
    ) -> Tensor:
        """Writes k and v to their slots, rotated; returns q, rotated and rounded to `dot`, or as it is."""
        if rotary is not None and q.shape[0] != k.shape[0]:
            raise ValueError(f"rotary needs a position for each new key: S must be T, not {k.shape[0]}, {q.shape[0]}")
        heads, kv_heads = q.shape[1], k.shape[1]
        turned = q if rotary is None else torch.empty(q.shape, dtype=dot, device=q.device)
        if k.shape[0]:
            grid = (k.shape[0], kv_heads + (heads if rotary is not None else 0))
            self._launch_rotation(grid, q, k, v, turned, k_blocks, v_blocks, inputs, rotary)
        return turned

    def _rotated(self, q: Tensor, inputs: AttentionInputs, rotary: Rotary, dot: torch.dtype) -> Tensor:
        """q alone; nothing is written."""
        turned = torch.empty(q.shape, dtype=dot, device=q.device)
        if q.shape[0]:
            nothing = q[:, :0]
            self._launch_rotation(q.shape[:2], q, nothing, nothing, turned, q, q, inputs, rotary)
        return turned

    def _launch_rotation(
        self,
        grid: tuple[int, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        turned: Tensor,
        k_blocks: Tensor,
        v_blocks: Tensor,
        inputs: AttentionInputs,
        rotary: Rotary | None,
    ) -> None:
        head_dim = q.shape[2]
        self._kernels.rotate_and_write[grid](
            q,
            k,
            v,
            turned,
            k_blocks,
            v_blocks,
            inputs.slots,
            inputs.positions,
            q if rotary is None else rotary.cos,
            q if rotary is None else rotary.sin,
            q.shape[1],
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            KV_HEADS=k.shape[1],
            D=head_dim,
            BLOCK_D=_power(head_dim),
            BLOCK_SIZE=v_blocks.shape[2],
            K_KEY=k_blocks.stride(-1),
            K_CHANNEL=k_blocks.stride(-2),
            HALF=0 if rotary is None else rotary.cos.shape[1],
            num_warps=1,
        )

    def _decode(self, out: Tensor, given: "_Arguments") -> None:
        rows, heads, head_dim = len(given.inputs.past_length), given.q.shape[1], given.q.shape[2]
        held = given.inputs.block_table.shape[1] * given.block_size
        splits = max(1, -(-held // self.tuning.split))
        tops, totals = torch.empty(2, rows, splits, heads, dtype=torch.float32, device=out.device).unbind()
        accs = torch.empty(rows, splits, heads, head_dim, dtype=torch.float32, device=out.device)
        bias, extra_k, extra_v = given.optional
        self._kernels.decode[(rows, given.kv_heads, splits)](
            given.q,
            given.k_blocks,
            given.v_blocks,
            *given.rows,
            *bias,
            extra_k,
            extra_v,
            tops,
            totals,
            accs,
            *given.numbers,
            **given.constants,
            BLOCK_M=max(16, _power(given.group)),
            BLOCK_N=self.tuning.tile,
            SPLIT=self.tuning.split,
            num_warps=self.tuning.warps,
            num_stages=self.tuning.stages if given.line_bytes <= 2 * WIDE else 1,
        )
        self._kernels.merge_splits[(rows, heads)](
            out,
            given.inputs.query_start,
            given.inputs.present_length,
            tops,
            totals,
            accs,
            splits,
            heads,
            D=head_dim,
            BLOCK_D=_power(head_dim),
            SPLIT=self.tuning.split,
            num_warps=1,
        )

    def _lanes(self, given: "_Arguments") -> int:
        """Of a prefill's program. Masks and wide heads take registers; products in float32 leave few of them."""
        lanes = 16 if given.dot == torch.float32 else self.tuning.lanes
        if given.line_bytes > WIDE:
            lanes //= 4
        elif given.inputs.bias is not None:
            lanes //= 2
        return max(16, lanes, _power(given.group))

    def _prefill(self, out: Tensor, given: "_Arguments") -> None:
        lanes = self._lanes(given)
        bias, extra_k, extra_v = given.optional
        self._kernels.prefill[given.tiles(lanes)](
            out,
            given.q,
            given.k_blocks,
            given.v_blocks,
            *given.rows,
            *bias,
            extra_k,
            extra_v,
            len(given.inputs.past_length),
            *given.numbers,
            **given.constants,
            BLOCK_M=lanes,
            BLOCK_N=self.tuning.tile,
            SPLIT=self.tuning.split,
            num_warps=self.tuning.prefill_warps,
            num_stages=self.tuning.prefill_stages if given.line_bytes <= WIDE else 1,
        )

    def _probabilities(self, out: Tensor, starts: Tensor, given: "_Arguments") -> None:
        lanes = self._lanes(given)
        bias, extra_k, _ = given.optional
        self._kernels.probabilities[given.tiles(lanes)](
            out,
            starts,
            given.q,
            given.k_blocks,
            *given.rows,
            *bias,
            extra_k,
            len(given.inputs.past_length),
            *given.numbers,
            **given.constants,
            BLOCK_M=lanes,
            BLOCK_N=self.tuning.tile,
            num_warps=self.tuning.prefill_warps,
            num_stages=1,
        )


class _Arguments:
    """What the three attention kernels take alike. A tensor that is not there is stood in for by one that is."""

    def __init__(
        self,
        q: Tensor,
        k_blocks: Tensor,
        v_blocks: Tensor,
        inputs: AttentionInputs,
        scoring: Scoring,
        dot: torch.dtype,
    ) -> None:
        self.q, self.k_blocks, self.v_blocks, self.inputs, self.dot = q, k_blocks, v_blocks, inputs, dot
        self.kv_heads, self.block_size = k_blocks.shape[1], k_blocks.shape[3]
        self.group = q.shape[1] // self.kv_heads
        self.line_bytes = _power(q.shape[2]) * dot.itemsize  # of a key, as products take it
        self.rows = (inputs.query_start, inputs.past_length, inputs.present_length, inputs.block_table)
        bias = (inputs.query_start, inputs.query_start) if inputs.bias is None else (inputs.bias, inputs.bias_start)
        extra_k = inputs.query_start if scoring.extra_k is None else scoring.extra_k.float()
        extra_v = inputs.query_start if scoring.extra_v is None else scoring.extra_v.float()
        self.optional = bias, extra_k, extra_v
        scale = scoring.scale * LOG2E
        self.numbers = (*q.stride()[:2], inputs.block_table.stride(0), scale)
        self.constants: dict[str, Any] = {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "D": q.shape[2],
            "BLOCK_D": _power(q.shape[2]),
            "BLOCK_SIZE": self.block_size,
            "K_KEY": k_blocks.stride(3),
            "K_CHANNEL": k_blocks.stride(2),
            "CAUSAL": inputs.causal,
            "HAS_BIAS": inputs.bias is not None,
            "EXTRAS": 0 if scoring.extra_k is None else scoring.extra_k.shape[0],
            "DOT": _triton_dtype(dot),
        }

    def tiles(self, lanes: int) -> tuple[int, int]:
        """Programs enough for every row's tiles, however the queries are shared among the rows."""
        return self.q.shape[0] // (lanes // self.group) + len(self.inputs.past_length), self.kv_heads


LOG2E = 1.4426950408889634
WIDE = 256  # bytes of a head's channels, 128 of them in 16 bits: with more, tiles and stages would not fit everywhere


def _supported(q: Tensor, scoring: Scoring) -> bool:
    return scoring.softmax_dtype == torch.float32 and q.dtype != torch.float64


def _triton_dtype(dtype: torch.dtype) -> Any:  # noqa: ANN401
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _power(size: int) -> int:
    """The next power of two; a product on tensor cores takes 16 at least."""
    return max(16, 1 << (size - 1).bit_length())
