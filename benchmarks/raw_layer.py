"""One step of the raw attention layer on a session, against the ways in which it is done without one.

Ours is measured twice: the layer alone (project, write, attend over the blocks), as the peers are bare torch modules;
and a whole engine step (admit, schedule, run, commit). Bound: reading the past's keys and values once.

    recompute   torch.nn.MultiheadAttention over the whole prefix
    cat         projections, torch.cat onto the cache, scaled_dot_product_attention
    in place    the same over a buffer that is written in place
    masked      a buffer of full length, the new position added under a one-hot mask over all of it, as MindSpore does

    python -m benchmarks.raw_layer [--context 4096 16384] [--rounds 5] [--save]
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.compare import HEADER, Pairs, interleave, median_ms, report
from benchmarks.peers.ours import run
from engine.attention.base import AttentionInputs
from engine.attention.view import PagedView
from engine.batch import Append
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_pool import KVPool
from engine.loading import LoadOptions, load_model

HIDDEN, HEADS = 1024, 16
DIM = HIDDEN // HEADS
GOALS = {
    (4096, "recompute"): 1000,
    (4096, "cat"): 12,
    (4096, "in place"): 10,
    (4096, "masked"): 18,
    (16384, "masked"): 35,
}


class Peer:
    """The layer in plain torch; `step` is one position on a past of `context` positions."""

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

    def steps(self) -> dict[str, Callable[[], object]]:
        return {"recompute": self.recompute, "cat": self.cat, "in place": self.in_place, "masked": self.masked}

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


class Ours:
    def __init__(self, cache: Path) -> None:
        spec = f"attention:hidden={HIDDEN},heads={HEADS}"
        loaded = load_model("layer", spec, LoadOptions(cache, kv_memory=4 << 30), lambda message: None)
        self.runner = loaded.runner
        self.engine = Engine([loaded.runner], EngineConfig())

    def layer(self, context: int) -> Callable[[], object]:
        """A step of the layer alone, its tensors at hand, on a past of `context` positions in blocks of its own."""
        spec, size = self.runner.spec, EngineConfig().block_size
        width = context // size + 1
        pool = KVPool(spec.kv, width + 1, size, "cpu")
        table = torch.arange(width, 0, -1, dtype=torch.int32)
        for stored in (pool.k, pool.v):
            stored.copy_(torch.randn(stored.shape))
        inputs = AttentionInputs(
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            past_length=torch.tensor([context], dtype=torch.int32),
            present_length=torch.tensor([context + 1], dtype=torch.int32),
            block_table=table[None],
            positions=torch.tensor([context]),
            slots=torch.tensor([int(table[-1]) * size + context % size]),
            causal=False,
            steps=True,
        )
        view = PagedView(pool, inputs, self.runner.backend)
        given = {name: torch.ones(1, HIDDEN, dtype=torch.bfloat16) for name in ("query", "key", "value")}
        return partial(self.runner.model.forward, given, view)

    def session(self, context: int) -> str:
        """With a past of `context` positions, appended in parts whose masks are small."""
        session = self.engine.create_session("layer").id
        for start in range(0, context, 512):
            n = min(512, context - start)
            mask = np.tri(n, start + n, start, dtype=np.uint8)[None]
            run(self.engine, [Append(session, {**self._inputs(n), "attention_mask": mask})])
        return session

    def step(self, sessions: list[str]) -> None:
        run(self.engine, [Append(session, self._inputs(1), step=True) for session in sessions])

    def _inputs(self, n: int) -> dict[str, np.ndarray]:
        return {name: np.ones((1, n, HIDDEN), np.float32) for name in ("query", "key", "value")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "keypast")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    ours = Ours(options.cache)
    print(HEADER)
    results = []
    with torch.inference_mode():
        for context in options.context:
            session = ours.session(context)
            sides: dict[str, Callable[[], object]] = {
                "layer": ours.layer(context),
                "engine": partial(ours.step, [session]),
            }
            for dtype in (torch.bfloat16, torch.float32):
                for side, step in sides.items():
                    results += against(side, step, Peer(dtype, context), dtype, options.rounds)
            ours.engine.delete_session(session)
    results.append(together(ours, options.rounds))
    report("raw_layer", results, {}, options.save)


def against(side: str, ours: Callable[[], object], peer: Peer, dtype: torch.dtype, rounds: int) -> list[Pairs]:
    results = []
    short = str(dtype).removeprefix("torch.")
    for name, step in peer.steps().items():
        if name == "recompute" and (peer.context > 4096 or side == "layer"):
            continue  # minutes a call
        goal = GOALS.get((peer.context, name))
        pairs = Pairs(f"{side} step at {peer.context}", f"{name} {short}", "ms", "less", goal)
        theirs = partial(median_ms, step, 1 if name == "recompute" else 20)
        results.append(interleave(pairs, lambda: median_ms(ours, 20), theirs, rounds))
    return results


def together(ours: Ours, rounds: int, sessions: int = 32, context: int = 1024) -> Pairs:
    ids = [ours.session(context) for _ in range(sessions)]
    pairs = Pairs(f"{sessions} sessions at {context}", "one after another", "ms", "less", 4)

    def apart() -> None:
        for session in ids:
            ours.step([session])

    return interleave(pairs, lambda: median_ms(lambda: ours.step(ids), 10), lambda: median_ms(apart, 3), rounds)


if __name__ == "__main__":
    main()
