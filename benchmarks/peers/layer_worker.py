"""The attention layer in plain torch, as it is done without a session: a JSON request a line in, a JSON reply out.

    recompute   torch.nn.MultiheadAttention over the whole prefix
    cat         projections, torch.cat onto the cache, scaled_dot_product_attention
    in place    the same over a buffer that is written in place
    masked      a buffer of full length, the new position added under a one-hot mask over all of it, as MindSpore does

{"dtype": "bfloat16", "context": 4096}    -> {}            a layer of that, on a past of so many positions
{"way": "cat", "repeats": 20}             -> {"ms": ..}    median of its steps
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.compare import median_ms
from benchmarks.peers.worker import TorchWorker, serve

HIDDEN, HEADS = 1024, 16
DIM = HIDDEN // HEADS
WAYS = ("recompute", "cat", "in place", "masked")


class LayerPeer(TorchWorker):
    def __init__(self, threads: int, *, huge_pages: bool) -> None:
        super().__init__("benchmarks.peers.layer_worker", threads, huge_pages=huge_pages)

    def begin(self, dtype: str, context: int) -> None:
        self.ask({"dtype": dtype, "context": context})

    def step_ms(self, way: str, repeats: int) -> float:
        return float(self.ask({"way": way, "repeats": repeats})["ms"])


class Layer:
    """Each way is one position on a past of `context` positions."""

    def __init__(self, dtype: torch.dtype, context: int) -> None:
        torch.manual_seed(0)
        self.layer = torch.nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True, dtype=dtype).eval()
        self.whole = torch.randn(1, context + 1, HIDDEN, dtype=dtype)
        self.new = self.whole[:, -1:]
        shape = (1, HEADS, context, DIM)
        self.past = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        longer = (1, HEADS, context + 1, DIM)
        self.buffers = torch.randn(longer, dtype=dtype), torch.randn(longer, dtype=dtype)
        self.context = context

    def way(self, name: str) -> Callable[[], object]:
        return dict(zip(WAYS, (self.recompute, self.cat, self.in_place, self.masked), strict=True))[name]

    def recompute(self) -> Tensor:
        hidden = torch.ones(self.context + 1, self.context + 1, dtype=torch.bool).triu(1)
        out, _ = self.layer(self.whole, self.whole, self.whole, attn_mask=hidden, is_causal=True, need_weights=False)
        last: Tensor = out[:, -1:]
        return last

    def cat(self) -> Tensor:
        q, k, v = self._project()
        return self._out(q, torch.cat([self.past[0], k], 2), torch.cat([self.past[1], v], 2))

    def in_place(self) -> Tensor:
        q, k, v = self._project()
        self.buffers[0][:, :, self.context :], self.buffers[1][:, :, self.context :] = k, v
        return self._out(q, *self.buffers)

    def masked(self) -> Tensor:
        q, k, v = self._project()
        at = (torch.arange(self.context + 1) == self.context).to(k.dtype)[:, None]
        keys, values = self.buffers[0] * (1 - at) + k * at, self.buffers[1] * (1 - at) + v * at
        bias = torch.zeros(1, 1, 1, self.context + 1, dtype=k.dtype)
        return self._out(q, keys, values, bias)

    def _project(self) -> list[Tensor]:
        projected = F.linear(self.new, self.layer.in_proj_weight, self.layer.in_proj_bias)
        return [part.view(1, 1, HEADS, DIM).transpose(1, 2) for part in projected.chunk(3, -1)]

    def _out(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        attended = F.scaled_dot_product_attention(q, k, v, bias)
        out: Tensor = self.layer.out_proj(attended.transpose(1, 2).flatten(2))
        return out


@torch.inference_mode()
def main() -> None:
    layer: Layer | None = None

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        nonlocal layer
        if "dtype" in asked:
            layer = Layer(getattr(torch, asked["dtype"]), asked["context"])
            return {}
        assert layer is not None, "begin first"
        return {"ms": median_ms(layer.way(asked["way"]), asked["repeats"])}

    serve(answer)


if __name__ == "__main__":
    main()
