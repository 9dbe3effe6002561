"""Our engine against transformers' own generate loop, in process, on the same bfloat16 weights, in turn.

Peers: a greedy loop of `model(...)` with a StaticCache, as `generate` runs it, eager and through torch.compile. Bounds:
as in `vs_llama`.

    python -m benchmarks.vs_transformers [--rounds 5] [--save]
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peers.compare import HEADER, Pairs, interleave, report
from benchmarks.peers.ours import OurEngine
from benchmarks.peers.servers import prompt
from engine.checkpoints.gguf import convert, default_model

STEPS = 16
GOALS = {("eager", 1): 3.5, ("eager", 16): 6, ("compiled", 1): 2.5, ("compiled", 16): 6}


class Transformers:
    def __init__(self, compiled: bool) -> None:
        cache = Path.home() / ".cache" / "keypast"
        path = convert(default_model(cache, print), cache)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self.model: Any = loaded.eval()
        self._call: Any = torch.compile(self.model, fullgraph=True) if compiled else self.model
        self._caches: dict[tuple[int, int], Any] = {}

    @torch.inference_mode()
    def step_ms(self, sessions: int, context: int) -> float:
        """Median of greedy steps of one batch whose rows are all `context` long."""
        ids = torch.tensor([prompt(seed, context) for seed in range(sessions)])
        cache = self._caches.setdefault((sessions, context), self._new_cache(context))
        cache.reset()
        tokens = self.model(ids, past_key_values=cache, cache_position=torch.arange(context)).logits[:, -1:].argmax(-1)
        times = []
        for at in range(context, context + STEPS):
            started = time.perf_counter()
            logits = self._call(tokens, past_key_values=cache, cache_position=torch.tensor([at])).logits
            tokens = logits[:, -1:].argmax(-1)
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times)

    def _new_cache(self, context: int) -> Any:
        return transformers.StaticCache(config=self.model.config, max_cache_len=context + STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    ours = OurEngine()
    results: list[Pairs] = []
    print(HEADER)
    for name in ("eager", "compiled"):
        peer = Transformers(name == "compiled")
        for sessions in (1, 16):
            peer.step_ms(sessions, 256)  # compiles
            pairs = Pairs(f"decode {sessions} x 256", f"transformers {name}", "ms", "less", GOALS[name, sessions])
            sides = partial(ours.step_ms, sessions, 256), partial(peer.step_ms, sessions, 256)
            results.append(interleave(pairs, *sides, options.rounds))
    report("vs_transformers", results, {"transformers": transformers.__version__}, options.save)


if __name__ == "__main__":
    main()
