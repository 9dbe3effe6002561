"""The attention layer in plain torch, as it is done without a session: a JSON request a line in, a JSON reply out.

    recompute   torch.nn.MultiheadAttention over the whole prefix
    cat         projections, torch.cat onto the cache, scaled_dot_product_attention
    in place    the same over a buffer that is written in place
    masked      a buffer of full length, the new position added under a one-hot mask over all of it, as MindSpore does

{"dtype": "bfloat16", "context": 4096}    -> {}            a layer of that, on a past of so many positions
{"way": "cat", "repeats": 20}             -> {"ms": ..}    median of its steps

A process of its own, so that torch is as a user has it: what the service sets for itself is not set here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.compare import median_ms

HIDDEN, HEADS = 1024, 16
DIM = HIDDEN // HEADS
WAYS = ("recompute", "cat", "in place", "masked")
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
_SET = (HUGE_PAGES, "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY")


class LayerPeer:
    """The worker's process; with `huge_pages` its tensors lie in pages of 2 MB, as ours do."""

    def __init__(self, threads: int, *, huge_pages: bool) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _SET}
        environment["OMP_NUM_THREADS"] = str(threads)
        if huge_pages:
            environment[HUGE_PAGES] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.layer_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent.parent,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()

    def begin(self, dtype: str, context: int) -> None:
        self._ask({"dtype": dtype, "context": context})

    def step_ms(self, way: str, repeats: int) -> float:
        return float(self._ask({"way": way, "repeats": repeats})["ms"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the layer's process ended")
        reply: dict[str, Any] = json.loads(line)
        return reply


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
    for line in sys.stdin:
        asked = json.loads(line)
        if "dtype" in asked:
            layer, reply = Layer(getattr(torch, asked["dtype"]), asked["context"]), {}
        else:
            assert layer is not None, "begin first"
            reply = {"ms": median_ms(layer.way(asked["way"]), asked["repeats"])}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
