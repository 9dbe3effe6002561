"""The seam between a layer and the past: a layer hands over q, k, v and gets the attended output.

Layouts (R rows, T queries and S new keys of all rows packed, W blocks in the widest table):

    q          (T, heads, head_dim)       any strides, last axis contiguous
    k, v       (S, kv_heads, head_dim)    likewise; query head h reads kv head h // (heads / kv_heads)
    K blocks   (blocks, kv_heads, head_dim, block_size)    keys transposed inside a block: a vector register holds one
                                                           channel of many keys, so scores need no horizontal sums;
                                                           on a GPU a view of keys that lie as values do
    V blocks   (blocks, kv_heads, block_size, head_dim)

Row r owns queries [query_start[r], query_start[r+1]); its query i stands at absolute position past_length[r] + i and
sees keys [0, past_length[r] + i] when `causal`, else [0, present_length[r]). S = T unless rows bring other numbers of
queries than of new keys (cross-attention: queries alone over keys that are there, keys alone).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.parallel import Ranks


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """One batch as a backend reads it. All tensors are on the model's device."""

    query_start: Tensor  # int32 (R + 1,)
    past_length: Tensor  # int32 (R,)
    present_length: Tensor  # int32 (R,)
    block_table: Tensor  # int32 (R, W), padded with the null block
    positions: Tensor  # int64 (T,) absolute position of each query; with rotary S = T, and of each key
    slots: Tensor  # int64 (S,) block * block_size + offset that each new key and value is written to
    causal: bool
    bias: Tensor | None = None  # float32, added to scores: each row's (n_r, present_length[r]), flattened, end to end
    bias_start: Tensor | None = None  # int64 (R + 1,) offsets into `bias`
    steps: bool = False  # the host knows that each row has exactly one query, and that there are no others


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary tables, float32 (max_length, rotary_dim / 2). The first rotary_dim channels of a head are rotated as two
    halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), as Hugging Face's Llama does; the rest pass through."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer weighs keys: softmax(q.k * scale + mask) in `softmax_dtype`, over the past and the layer's own keys.

    `extra_k`, `extra_v`: float32 (E, kv_heads, head_dim), keys and values that every query sees besides the past and no
    mask hides (add_bias_kv, add_zero_attn); they have no position. In probabilities they are the last E columns.
    `dropout`: of probabilities, in training only. `ranks`: those that hold the other heads, where a layer is cut.
    """

    scale: float
    extra_k: Tensor | None = None
    extra_v: Tensor | None = None
    softmax_dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    ranks: Ranks | None = None


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """All blocks of a decoder as one list, for a backend that runs them in one call. `weights`, for each block:

    attention_norm, qkv and its bias, q_norm, k_norm, o_proj and its bias, feed_forward_norm, gate_up, its bias,
    down_proj, its bias: linears packed for the native kernels, with float32 biases; None for what a
    family does not have.
    """

    weights: list[Tensor | None]
    heads: int
    scale: float
    eps: float


class KVView(Protocol):
    """What a layer sees of the past, wherever that is kept."""

    @property
    def backend(self) -> "Backend": ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, scoring: Scoring) -> Tensor:
        """q (..., heads, head_dim), k and v (..., kv_heads, head_dim): writes k and v to the layer's past, then attends
        over the present. Returns (..., heads * head_dim)."""
        ...


class Backend(Protocol):
    """What stands between a layer's linears. Chosen once at start; `sdpa` is the slow truth of every other one."""

    name: str
    recordable: bool  # `attend` of steps, and the norms and gates, read no value on the host

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
        """Rotate q and k, write k and v to `inputs.slots`, attend. Returns (T, heads * head_dim) in q's dtype.

        Scores are in float32 at least; a query whose every key is masked (-inf bias) gives zeros, if the layer has no
        keys of its own. Slots that hold no valid position may contain anything, NaN too, and must not reach the output.
        Queries of no row give zeros. Raises ValueError or RuntimeError for `rotary` where S is not T."""
        ...

    def finite(self, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> tuple[bool, bool]:
        """Whether the keys and the values at these slots are, as they are stored. Reads them on the host."""
        ...

    def probabilities(
        self, q: Tensor, k_blocks: Tensor, inputs: AttentionInputs, rotary: Rotary | None, scoring: Scoring
    ) -> list[Tensor]:
        """What `attend` weighed the values with, once it has written the keys: a row's (heads, n_r, present_length +
        E), in `scoring.softmax_dtype`. Reads lengths on the host."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (T, H). With `residual`: s = x + residual (in x's dtype). Returns (norm(s) * weight, s); float32 inside."""
        ...

    def silu_gate(self, x: Tensor) -> Tensor:
        """x (T, 2F) holding (gate, up) side by side -> silu(gate) * up, (T, F); float32 inside."""
        ...

    def decoder_blocks(
        self, x: Tensor, blocks: PackedBlocks, k: Tensor, v: Tensor, inputs: AttentionInputs, rotary: Rotary | None
    ) -> Tensor | None:
        """x (T, H) through every block, over the pool's k and v of all layers; None: run them one by one."""
        ...
